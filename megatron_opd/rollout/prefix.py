"""How much of a trace a response begins with: TrOPD's off-policy guidance."""

from dataclasses import dataclass

import numpy as np

from megatron_opd.contracts.draws import Stream, generator
from megatron_opd.contracts.rows import Task
from megatron_opd.methods.method import PrefixConfig
from megatron_opd.methods.schedules import cosine
from megatron_opd.recipe.keys import RolloutConfig


@dataclass(frozen=True)
class PrefixLaw:
    """(task, sample) -> the tokens its response begins with at `step`, int32; the student samples
    at least one more.

    The paper gives the largest length (cosine from the longest response to 0) and not how a
    response's own is drawn: `law` chooses. The draw depends on (seed, step, task, sample) alone.
    """

    prefix: PrefixConfig
    rollout: RolloutConfig
    step: int
    seed: int

    def __call__(self, task: Task, sample: int) -> np.ndarray:
        assert task.trace_ids is not None, "the plan asks for traces"
        most = self.rollout.max_completion_tokens
        length = int(most * cosine(self.step, self.prefix.steps))
        if self.prefix.law == "uniform":
            draw = generator(self.seed, self.step, task.index, sample, Stream.PREFIX)
            length = int(draw.integers(length + 1))
        return task.trace_ids[: max(0, min(length, len(task.trace_ids) - 1, most - 1))]
