"""Completions of student and teacher together: MiniLLM's teacher-mixed sampling.

Every token is drawn from the mixture (1 - a) p_student + a p_teacher: a coin chooses the model, and
a stretch of tokens of one model is sampled at a time by its own engine. Source: MiniLLM, arXiv
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
from megatron_opd.rollout.requests import new_episodes, room
from megatron_opd.rollout.single_turn import completed_row


@dataclass
class Draft:
    """A completion on its way."""

    episode: Episode
    by_teacher_L: np.ndarray  # bool, the coins: whether the teacher writes the token of a place
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = ""

    def is_due(self, *, is_teacher: bool) -> bool:
        """True when this model writes the next token."""
        if self.finish_reason:
            return False
        return bool(self.by_teacher_L[len(self.token_ids)]) == is_teacher

    def request(self, draw: Draw) -> Request:
        """The request for the stretch of tokens that begins here."""
        rest_L = self.by_teacher_L[len(self.token_ids) :]
        changes = np.flatnonzero(rest_L != rest_L[0])
        length = int(changes[0]) if len(changes) else len(rest_L)
        task = self.episode.task
        prompt_ids = np.concatenate([task.prompt_ids, np.array(self.token_ids, np.int32)])
        drawn = len(self.token_ids)
        seed = request_seed(draw.seed, draw.step, task.index, self.episode.sample, drawn)
        return Request(task, prompt_ids, length, seed)

    def extend(self, completion: Completion) -> None:
        """Appends a stretch of tokens."""
        self.token_ids += completion.token_ids
        # The student's engine did not draw the teacher's tokens, which like given ones have no
        # logprob of its own.
        of_teacher = self.by_teacher_L[len(self.logprobs)]
        self.logprobs += [0.0] * len(completion.token_ids) if of_teacher else completion.logprobs
        if completion.finish_reason == "stop" or len(self.token_ids) == len(self.by_teacher_L):
            self.finish_reason = completion.finish_reason


class Mixture:
    """Samples completions in which a token is the teacher's with probability `teacher_share`.

    `Row.sources` tells the writer of a token. The engines, both of this process, alternate as often
    as the writers of some sample do; keys and values of a context are kept within the call. By
    `merged`, an end that the teacher alone has becomes the student's; the teacher's engine must
    stop at the student's too.
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
        """`draw.samples` rows of every task: see `Sampler.sample`."""
        drafts = [self._begin(episode, draw) for episode in new_episodes(tasks, draw.samples)]
        used: set[bool] = set()
        while any(not draft.finish_reason for draft in drafts):
            for is_teacher in (False, True):
                due = [draft for draft in drafts if draft.is_due(is_teacher=is_teacher)]
                sampling = replace(draw.sampling, keep_cache=is_teacher in used)
                if is_teacher:
                    sampling = replace(sampling, version=0)  # the weights of its directory
                engine = self._teacher if is_teacher else self._student
                completions = engine.complete([draft.request(draw) for draft in due], sampling)
                if due:
                    used.add(is_teacher)
                for draft, completion in zip(due, completions, strict=True):
                    draft.extend(merged_end(completion, self._merged) if is_teacher else completion)
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
            has_end=draft.finish_reason == "stop",
            version=draw.version,
            tokenizer=self._tokenizer,
        )


def merged_end(completion: Completion, merged: MergedIds | None) -> Completion:
    """The completion with the student's end in the place of one that the teacher alone has."""
    if merged is None or completion.token_ids[-1] not in merged.ids:
        return completion
    return replace(completion, token_ids=[*completion.token_ids[:-1], merged.into])
