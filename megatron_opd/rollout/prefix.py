"""How much of a trace a response begins with: TrOPD's off-policy guidance."""

from collections.abc import Callable

import numpy as np

from megatron_opd.config.plan import cosine
from megatron_opd.config.schema import RolloutConfig
from megatron_opd.config.terms import PrefixConfig
from megatron_opd.records import Prompt

PrefixLaw = Callable[[Prompt, int], np.ndarray]


def prefix_law(prefix: PrefixConfig, rollout: RolloutConfig, step: int, seed: int) -> PrefixLaw:
    """(prompt, sample) -> the tokens its response begins with at `step`, int32; the student samples at least one more.

    The paper gives the largest length (cosine from the longest response to 0) and not how a response's own is drawn:
    `law` chooses. The draw depends on (seed, step, prompt, sample) alone.
    """
    longest = int(rollout.max_completion_tokens * cosine(step, prefix.steps))

    def tokens(prompt: Prompt, sample: int) -> np.ndarray:
        assert prompt.trace_ids is not None, "the plan asks for traces"
        length = longest
        if prefix.law == "uniform":
            length = int(np.random.default_rng([seed, step, prompt.index, sample, 1]).integers(longest + 1))
        return prompt.trace_ids[: max(0, min(length, len(prompt.trace_ids) - 1, rollout.max_completion_tokens - 1))]

    return tokens
