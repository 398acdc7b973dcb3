"""Forward and backward passes of a list of micro-batches through Megatron's schedules (pipelined or not)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_opd.mcore.batch import MicroBatch
from megatron_opd.mcore.parallel import Parallel

# Called on the last pipeline stage with the logits of the positions that predict completion tokens.
LossFunction = Callable[[MicroBatch, Tensor], tuple[Tensor, Any]]


def run(
    chunks: list[torch.nn.Module],
    parallel: Parallel,
    batches: Sequence[MicroBatch],
    loss: LossFunction,
    *,
    forward_only: bool,
) -> list[Any]:
    """Runs every micro-batch; returns what `loss` returned as its second value, in order (last stage; [] elsewhere).

    `loss(micro_batch, logits_TV)` returns a scalar to differentiate (already divided by its global denominators; the
    gradients of the micro-batches add up) and any value to collect. Collective over the model-parallel group.
    """
    if not batches:
        return []

    def forward_step(iterator, model):
        batch = next(iterator)
        output_BSV = model(batch.tokens_BS, batch.positions_BS, None)
        return output_BSV, partial(_on_logits, batch, loss)

    with parallel.active():
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=chunks,
            num_microbatches=len(batches),
            # With variable sequence lengths the stages tell each other the shapes; these two are upper bounds.
            seq_length=max(b.shape[1] for b in batches),
            micro_batch_size=batches[0].shape[0],
            forward_only=forward_only,
        )


def _on_logits(batch: MicroBatch, loss: LossFunction, output_BSV: Tensor) -> tuple[Tensor, Tensor, Any]:
    value, collected = loss(batch, output_BSV.flatten(0, 1)[batch.predict_T])
    # Megatron's three-tuple form leaves the value unscaled; the token count has no use, see `train.student`.
    return value, torch.zeros((), dtype=torch.int, device=value.device), collected
