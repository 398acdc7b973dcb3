"""The first tokens of a completion that come from a trace: TrOPD's off-policy guidance."""

import numpy as np

from megatron_opd.contracts.draws import Stream, generator
from megatron_opd.contracts.rows import Task
from megatron_opd.contracts.sampling import Draw
from megatron_opd.methods.method import PrefixConfig
from megatron_opd.methods.schedules import cosine


def prefix_of(prefix: PrefixConfig, task: Task, sample: int, draw: Draw) -> np.ndarray:
    """The tokens, int32, that a completion begins with; the student samples at least one more.

    The paper gives the largest length (by a cosine from the longest completion to 0), but not how a
    completion's own length is drawn, which `law` chooses. It depends on (seed, step, task, sample)
    alone.
    """
    assert task.trace_ids is not None, "a method with prefixes needs traces"
    length = int(draw.max_tokens * cosine(draw.step, prefix.steps))
    if prefix.law == "uniform":
        random = generator(draw.seed, draw.step, task.index, sample, Stream.PREFIX)
        length = int(random.integers(length + 1))
    return task.trace_ids[: max(0, min(length, len(task.trace_ids) - 1, draw.max_tokens - 1))]
