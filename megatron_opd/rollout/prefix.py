"""How much of a trace a response begins with: TrOPD's off-policy guidance."""

import numpy as np

from megatron_opd.contracts.draws import Stream, generator
from megatron_opd.contracts.rows import Task
from megatron_opd.contracts.sampling import Draw
from megatron_opd.methods.method import PrefixConfig
from megatron_opd.methods.schedules import cosine


def prefix_of(prefix: PrefixConfig, task: Task, sample: int, draw: Draw) -> np.ndarray:
    """The tokens that a response begins with, int32; the student samples at least one more.

    The paper gives the largest length (cosine from the longest response to 0) and not how a
    response's own is drawn: `law` chooses. It depends on (seed, step, task, sample) alone.
    """
    assert task.trace_ids is not None, "a method with prefixes needs traces"
    length = int(draw.max_tokens * cosine(draw.step, prefix.steps))
    if prefix.law == "uniform":
        random = generator(draw.seed, draw.step, task.index, sample, Stream.PREFIX)
        length = int(random.integers(length + 1))
    return task.trace_ids[: max(0, min(length, len(task.trace_ids) - 1, draw.max_tokens - 1))]
