"""Recorded rollouts: random text of the kind a method reads, the same in every process."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_opd.contracts.rows import Prompt, Rollout
from megatron_opd.methods.needs import needs_of
from megatron_opd.methods.terms import MethodConfig
from megatron_opd.recipe.keys import RunConfig


def recorded(config: RunConfig, vocab_size: int) -> list[Rollout]:
    """`num_prompts` groups of random completions with rewards 0 and 1.

    Their logprobs are of a policy that is not the student's.
    """
    rng = np.random.default_rng(7)
    longest = config.rollout.max_completion_tokens
    rollouts = []
    for group in range(config.rollout.num_prompts):
        prompt = Prompt(
            group, "", "", "", rng.integers(2, vocab_size, rng.integers(1, 9)).astype(np.int32)
        )
        for sample in range(config.rollout.samples_per_prompt):
            length = int(rng.integers(1, longest))
            token_ids = rng.integers(2, vocab_size, length).astype(np.int32)
            logprobs = rng.normal(-3, 0.5, length).astype(np.float32)
            # some groups have no right answer
            reward = float((group + sample) % 3 == 0 and group % 4 != 3)
            rollouts.append(
                Rollout(
                    prompt, sample, token_ids, logprobs, "", "stop", 0, group=group, reward=reward
                )
            )
    return as_read_by(config.method, rollouts)


def as_read_by(method: MethodConfig, rollouts: Sequence[Rollout]) -> list[Rollout]:
    """The rollouts with the sources of tokens that `method` reads.

    Some become traces where it learns from traces; others get a given prefix, or tokens that the
    teacher drew, where it has such.
    """
    if not needs_of(method).rollouts:
        return [replace(r, given=r.num_tokens) for r in rollouts]
    if method.traces_per_group:
        return [replace(r, given=r.num_tokens * (i % 4 == 3)) for i, r in enumerate(rollouts)]
    if method.teacher_share:
        return [
            replace(r, by_teacher=np.arange(r.num_tokens) % 3 == i % 3)
            for i, r in enumerate(rollouts)
        ]
    if method.prefix:
        return [replace(r, given=min(i % 3, r.num_tokens - 1)) for i, r in enumerate(rollouts)]
    return list(rollouts)


def with_logprobs(rollouts: Sequence[Rollout], logprobs_T: np.ndarray) -> list[Rollout]:
    """The rollouts with other logprobs, which are flat over all tokens."""
    ends = np.cumsum([r.num_tokens for r in rollouts])
    return [
        replace(r, logprobs=logprobs)
        for r, logprobs in zip(rollouts, np.split(logprobs_T, ends[:-1]), strict=True)
    ]
