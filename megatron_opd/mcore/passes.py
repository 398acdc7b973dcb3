"""Forward and backward passes of micro-batches, through Megatron's schedules."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_opd.mcore.batch import MicroBatch
from megatron_opd.mcore.head import Head, make_head
from megatron_opd.mcore.parallel import Parallel
from megatron_opd.mcore.specs import uses_transformer_engine

# Called on the last stage with the model's head at the positions that predict completion tokens.
type LossFunction[Collected] = Callable[[MicroBatch, Head], tuple[Tensor, Collected]]


def forward_backward[Collected](
    chunks: list[torch.nn.Module],
    parallel: Parallel,
    batches: Sequence[MicroBatch],
    loss: LossFunction[Collected],
    *,
    forward_only: bool,
    fused_output_layer: bool = False,
) -> list[Collected]:
    """Runs every micro-batch, and adds up their gradients unless `forward_only`.

    `loss(micro_batch, head)` returns a scalar to differentiate, which is already divided by its
    global denominators, and any value to collect. Returns these values in order on the last stage,
    [] elsewhere. Collective over the model-parallel group.
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
            # Stages tell one another the shapes of variable lengths; these are upper bounds.
            seq_length=max(batch.tokens_1S.shape[1] for batch in batches),
            micro_batch_size=1,
            forward_only=forward_only,
        )


def _on_head[Collected](
    batch: MicroBatch, loss: LossFunction[Collected], head: Head
) -> tuple[Tensor, Tensor, Collected]:
    value, collected = loss(batch, head)
    # Megatron leaves the value unscaled if it gets three results. The token count has no use: see
    # `trainer.student._finalize`.
    return value, torch.zeros((), dtype=torch.int, device=value.device), collected
