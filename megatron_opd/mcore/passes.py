"""Forward and backward passes of a list of micro-batches through Megatron's schedules (pipelined or
not)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_opd.mcore.batch import MicroBatch
from megatron_opd.mcore.head import Head, make_head
from megatron_opd.mcore.parallel import Parallel
from megatron_opd.mcore.specs import uses_transformer_engine

# Called on the last pipeline stage with the model's head at the positions that predict completion
# tokens.
LossFunction = Callable[[MicroBatch, Head], tuple[Tensor, Any]]


def forward_backward(
    chunks: list[torch.nn.Module],
    parallel: Parallel,
    batches: Sequence[MicroBatch],
    loss: LossFunction,
    *,
    forward_only: bool,
    fused_output_layer: bool = False,
) -> list[Any]:
    """Runs every micro-batch; returns what `loss` returned as its second value, in order (last
    stage; [] elsewhere).

    `loss(micro_batch, head)` returns a scalar to differentiate (already divided by its global
    denominators; the gradients of the micro-batches add up) and any value to collect. Collective
    over the model-parallel group.
    """
    if not batches:
        return []

    def forward_step(iterator, model):
        batch = next(iterator)
        head = partial(make_head, batch.predict_T, parallel.tp_group, fused_output_layer)
        positions_1S = batch.packing.positions_S[None]
        packing = batch.packing.thd() if uses_transformer_engine(parallel.device) else batch.packing
        output = model(
            batch.tokens_1S, positions_1S, None, packed_seq_params=packing, output_processor=head
        )
        return output, partial(_on_head, batch, loss)

    with parallel.active():
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(batches) for _ in chunks],
            model=chunks,
            num_microbatches=len(batches),
            # With variable sequence lengths the stages tell each other the shapes; these two are
            # upper bounds.
            seq_length=max(batch.tokens_1S.shape[1] for batch in batches),
            micro_batch_size=1,
            forward_only=forward_only,
        )


def _on_head(batch: MicroBatch, loss: LossFunction, head: Head) -> tuple[Tensor, Tensor, Any]:
    value, collected = loss(batch, head)
    # Megatron's three-tuple form leaves the value unscaled; the token count has no use, see
    # `train.student`.
    return value, torch.zeros((), dtype=torch.int, device=value.device), collected
