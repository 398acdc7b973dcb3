"""Completions whose tokens come from the student or from the teacher: MiniLLM's teacher-mixed
sampling.

Every token is drawn from the mixture (1 - a) p_student + a p_teacher: a coin decides whose turn it
is, and runs of equal turns are sampled at a time by that model's own engine. Source: MiniLLM, arXiv
2306.08543, section 2.2.
"""

from dataclasses import dataclass, field, replace

import numpy as np

from megatron_opd.contracts.draws import Stream, generator, request_seed
from megatron_opd.contracts.merged_ids import MergedIds
from megatron_opd.contracts.rows import Row, Task
from megatron_opd.contracts.stations import Engine
from megatron_opd.rollout.requests import Completion, Request, room, sample_numbers
from megatron_opd.rollout.vllm.engine import VllmEngine


@dataclass
class Draft:
    """A completion on its way."""

    task: Task
    sample: int
    by_teacher_L: np.ndarray  # bool, whose turn it is at every place it may come to
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = ""

    def turn(self) -> bool:
        """Whether the next token is the teacher's."""
        return bool(self.by_teacher_L[len(self.token_ids)])

    def request(self, seed: int, step: int) -> Request:
        """For the run of equal turns that begins here."""
        rest_L = self.by_teacher_L[len(self.token_ids) :]
        changes = np.flatnonzero(rest_L != rest_L[0])
        length = int(changes[0]) if len(changes) else len(rest_L)
        drawn = len(self.token_ids)
        own_seed = request_seed(seed, step, self.task.index, self.sample, drawn)
        return Request(self.task, np.array(self.token_ids, np.int32), length, own_seed)

    def extend(self, completion: Completion) -> None:
        self.token_ids += completion.token_ids
        # The student's engine has not seen the teacher's tokens: like given ones, they have no
        # logprob of its own.
        of_teacher = self.by_teacher_L[len(self.logprobs)]
        self.logprobs += [0.0] * len(completion.token_ids) if of_teacher else completion.logprobs
        if completion.finish_reason == "stop" or len(self.token_ids) == len(self.by_teacher_L):
            self.finish_reason = completion.finish_reason


def generate_mixture(
    student: Engine,
    teacher: Engine,
    tasks: list[Task],
    *,
    teacher_share: float,
    version: int,
    step: int,
    samples_per_prompt: int,
    max_completion_tokens: int,
    temperature: float,
    seed: int,
    merged: MergedIds | None = None,
) -> list[Row]:
    """`samples_per_prompt` completions of each task, task-major; a token is the teacher's
    with probability `teacher_share`.

    Seeds and errors are as in `Engine.generate`. The engines alternate, once per change of
    turns of the sample that has most; what they computed of a context is kept within the call.
    `Row.sources` says whose a token is. An end that the teacher alone has becomes the
    student's, as `merged` says; its engine must stop at the student's.
    """
    assert isinstance(student, VllmEngine) and isinstance(teacher, VllmEngine), "of this process"
    drafts = []
    for task in tasks:
        length = room(task, max_completion_tokens, student.max_sequence_length)
        for sample in sample_numbers(task, samples_per_prompt):
            draws_L = generator(seed, step, task.index, sample, Stream.COINS).random(length)
            drafts.append(Draft(task, sample, draws_L < teacher_share))
    used = set()
    while any(not draft.finish_reason for draft in drafts):
        for engine, turn, of_version in ((student, False, version), (teacher, True, 0)):
            due = [draft for draft in drafts if not draft.finish_reason and draft.turn() == turn]
            requests = [draft.request(seed, step) for draft in due]
            completions = engine.complete(
                requests, version=of_version, temperature=temperature, keep_cache=turn in used
            )
            used |= {turn} if due else set()
            for draft, completion in zip(due, completions, strict=True):
                draft.extend(merged_end(completion, merged) if turn else completion)
    return [
        student.row(
            draft.task, draft.sample, draft.token_ids, draft.logprobs,
            draft.by_teacher_L[: len(draft.token_ids)],  # Source.STUDENT or Source.TEACHER
            draft.finish_reason,
        )
        for draft in drafts
    ]  # fmt: skip


def merged_end(completion: Completion, merged: MergedIds | None) -> Completion:
    """The completion with the student's end in the place of one that the teacher alone has."""
    if merged is None or completion.token_ids[-1] not in merged.ids:
        return completion
    return replace(completion, token_ids=[*completion.token_ids[:-1], merged.into])
