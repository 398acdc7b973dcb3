"""Recorded rows: random text of the kind a method reads, the same in every process."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_opd.contracts.rows import Episode, Row, Source, Task
from megatron_opd.methods.method import MethodConfig
from megatron_opd.methods.needs import needs_of
from megatron_opd.recipe.keys import RunConfig


def recorded(config: RunConfig, vocab_size: int) -> list[Row]:
    """`num_prompts` groups of random completions with rewards 0 and 1.

    Their logprobs are of a policy that is not the student's.
    """
    rng = np.random.default_rng(7)
    longest = config.rollout.max_completion_tokens
    rows = []
    for group in range(config.rollout.num_prompts):
        task = Task(
            group, "", "", "", rng.integers(2, vocab_size, rng.integers(1, 9)).astype(np.int32)
        )
        for sample in range(config.rollout.samples_per_prompt):
            length = int(rng.integers(1, longest))
            token_ids = rng.integers(2, vocab_size, length).astype(np.int32)
            logprobs = rng.normal(-3, 0.5, length).astype(np.float32)
            # some groups have no right answer
            reward = float((group + sample) % 3 == 0 and group % 4 != 3)
            episode = Episode(task, sample, group, reward=reward)
            rows.append(Row.of_student(episode, token_ids, logprobs, version=0))
    return as_read_by(config.method, rows)


def as_read_by(method: MethodConfig, rows: Sequence[Row]) -> list[Row]:
    """The rows with the sources of tokens that `method` reads.

    Some become traces where it learns from traces; others get a given prefix, or tokens that the
    teacher drew, where it has such.
    """
    if not needs_of(method).rollouts:
        return [begun_with_trace(r, r.num_tokens) for r in rows]
    if method.traces_per_group:
        return [begun_with_trace(r, r.num_tokens) if i % 4 == 3 else r for i, r in enumerate(rows)]
    if method.teacher_share:
        return [
            replace(r, sources=(np.arange(r.num_tokens) % 3 == i % 3).astype(np.int8))
            for i, r in enumerate(rows)
        ]
    if method.prefix:
        return [begun_with_trace(r, min(i % 3, r.num_tokens - 1)) for i, r in enumerate(rows)]
    return list(rows)


def begun_with_trace(row: Row, tokens: int) -> Row:
    """The row as if its first `tokens` were of a trace, but for what an environment wrote."""
    of_trace_T = (np.arange(row.num_tokens) < tokens) & row.written_T
    return replace(
        row,
        sources=np.where(of_trace_T, Source.TRACE, row.sources).astype(np.int8),
        versions=np.where(of_trace_T, -1, row.versions).astype(np.int32),
    )


def with_logprobs(rows: Sequence[Row], logprobs_T: np.ndarray) -> list[Row]:
    """The rows with other logprobs, which are flat over all tokens."""
    ends = np.cumsum([r.num_tokens for r in rows])
    return [
        replace(r, logprobs=logprobs)
        for r, logprobs in zip(rows, np.split(logprobs_T, ends[:-1]), strict=True)
    ]
