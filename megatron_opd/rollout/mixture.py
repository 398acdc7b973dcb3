"""Completions whose tokens come from the student or from the teacher: MiniLLM's teacher-mixed
sampling.

Every token is drawn from the mixture (1 - a) p_student + a p_teacher: a coin decides whose turn it
is, and runs of equal turns are sampled at a time by that model's own engine. Source: MiniLLM, arXiv
2306.08543, section 2.2.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from megatron_opd.contracts.draws import Stream, generator, request_seed
from megatron_opd.contracts.merged_ids import MergedIds
from megatron_opd.contracts.rows import Episode, Row, Task
from megatron_opd.contracts.sampling import Completion, Draw, Request
from megatron_opd.contracts.stations import Engine, Tokenizer
from megatron_opd.rollout.requests import room, sample_numbers
from megatron_opd.rollout.single_turn import completed_row


@dataclass
class Draft:
    """A completion on its way."""

    episode: Episode
    by_teacher_L: np.ndarray  # bool, whose turn it is at every place it may come to
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = ""

    def turn(self) -> bool:
        """Whether the next token is the teacher's."""
        return bool(self.by_teacher_L[len(self.token_ids)])

    def request(self, draw: Draw) -> Request:
        """For the run of equal turns that begins here."""
        rest_L = self.by_teacher_L[len(self.token_ids) :]
        changes = np.flatnonzero(rest_L != rest_L[0])
        length = int(changes[0]) if len(changes) else len(rest_L)
        task = self.episode.task
        prompt_ids = np.concatenate([task.prompt_ids, np.array(self.token_ids, np.int32)])
        drawn = len(self.token_ids)
        seed = request_seed(draw.seed, draw.step, task.index, self.episode.sample, drawn)
        return Request(task, prompt_ids, length, seed)

    def extend(self, completion: Completion) -> None:
        self.token_ids += completion.token_ids
        # The student's engine has not seen the teacher's tokens: like given ones, they have no
        # logprob of its own.
        of_teacher = self.by_teacher_L[len(self.logprobs)]
        self.logprobs += [0.0] * len(completion.token_ids) if of_teacher else completion.logprobs
        if completion.finish_reason == "stop" or len(self.token_ids) == len(self.by_teacher_L):
            self.finish_reason = completion.finish_reason


class Mixture:
    """Samples completions of which a token is the teacher's with probability `teacher_share`.

    The engines, of this process, alternate, once per change of turns of the sample that has most;
    what they computed of a context is kept within the call. `Row.sources` says whose a token is. An
    end that the teacher alone has becomes the student's, as `merged` says; its engine must stop at
    the student's.
    """

    def __init__(
        self,
        student: Engine,
        teacher: Engine,
        tokenizer: Tokenizer,
        teacher_share: float,
        merged: MergedIds | None = None,
    ) -> None:
        self._student = student
        self._teacher = teacher
        self._tokenizer = tokenizer
        self._teacher_share = teacher_share
        self._merged = merged

    def sample(self, tasks: Sequence[Task], draw: Draw) -> list[Row]:
        """As `Sampler.sample`: `draw.samples` rows of every task."""
        drafts = [
            self._begin(Episode(task, sample, group), draw)
            for group, task in enumerate(tasks)
            for sample in sample_numbers(task, draw.samples)
        ]
        # the teacher's weights are those of its directory
        turns = (
            (False, self._student, draw.sampling),
            (True, self._teacher, replace(draw.sampling, version=0)),
        )
        used = set()
        while any(not draft.finish_reason for draft in drafts):
            for turn, engine, sampling in turns:
                due = [d for d in drafts if not d.finish_reason and d.turn() == turn]
                requests = [draft.request(draw) for draft in due]
                kept = replace(sampling, keep_cache=turn in used)
                completions = engine.complete(requests, kept)
                used |= {turn} if due else set()
                for draft, completion in zip(due, completions, strict=True):
                    draft.extend(merged_end(completion, self._merged) if turn else completion)
        return [self._row(draft, draw) for draft in drafts]

    def _begin(self, episode: Episode, draw: Draw) -> Draft:
        task = episode.task
        length = room(task, draw.max_tokens, self._student.max_sequence_length)
        random = generator(draw.seed, draw.step, task.index, episode.sample, Stream.COINS)
        return Draft(episode, random.random(length) < self._teacher_share)

    def _row(self, draft: Draft, draw: Draw) -> Row:
        return completed_row(
            draft.episode,
            draft.token_ids,
            draft.logprobs,
            draft.by_teacher_L[: len(draft.token_ids)],  # Source.STUDENT or Source.TEACHER
            draft.finish_reason,
            version=draw.version,
            tokenizer=self._tokenizer,
        )


def merged_end(completion: Completion, merged: MergedIds | None) -> Completion:
    """The completion with the student's end in the place of one that the teacher alone has."""
    if merged is None or completion.token_ids[-1] not in merged.ids:
        return completion
    return replace(completion, token_ids=[*completion.token_ids[:-1], merged.into])
