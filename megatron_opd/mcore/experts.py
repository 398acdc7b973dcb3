"""All experts of a rank at once: their weights are stacked, and every linear layer is one grouped
product.

The numbers and the checkpoint are those of Megatron's `SequentialMLP`, whose place it takes in the
layer.
"""

from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import grouped_mm, silu

Offsets = tuple[tuple[int, int, int], ...]  # Megatron's: (axis, place on it, number of places)


class GroupedLinear(torch.nn.Module):
    """One linear layer of each of E experts, without bias. `weight` is [E, outputs, inputs], this
    rank's slices.

    `dim` of an expert's own weight is sliced over the expert-tensor-parallel ranks, in `blocks`
    equal blocks.
    """

    def __init__(
        self, shape: tuple[int, int, int], config: TransformerConfig, *, dim: int, blocks: int
    ) -> None:
        super().__init__()
        self.dim, self.blocks = dim, blocks
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(
            torch.empty(shape, dtype=config.params_dtype, device=device)
        )
        set_tensor_model_parallel_attributes(
            self.weight, is_parallel=True, dim=dim + 1, stride=blocks
        )
        # Whether the experts' replicas are those of the dense layers: then both share a gradient
        # buffer.
        spread = config.expert_model_parallel_size > 1
        as_dense = (
            config.expert_tensor_parallel_size == config.tensor_model_parallel_size and not spread
        )
        self.weight.allreduce = as_dense  # type: ignore[attr-defined]

    def forward(self, x_TI: Tensor, ends_E: Tensor) -> Tensor:
        """Tokens sorted by expert; `ends_E`, int32: where each expert's end. -> [T, outputs]."""
        out_TO = grouped_mm(x_TI, self.weight.transpose(1, 2), offs=ends_E)
        if out_TO.requires_grad:
            out_TO.register_hook(_in_order)
        return out_TO

    def split(
        self,
        experts: list[Offsets],
        group: ProcessGroup,
        key: str,
        value_EOI: Tensor,
        replica_id: Any,
        _: Any = None,
    ) -> list[ShardedTensor]:
        """A tensor of the weight's shape as a checkpoint stores it; `experts` are their places on
        its leading axes."""
        stored = []
        for place, value_OI in zip(experts, value_EOI.unbind(0), strict=True):
            for block, part in enumerate(value_OI.chunk(self.blocks, self.dim)):
                slice_ = (
                    len(place) + self.dim,
                    block * group.size() + group.rank(),
                    self.blocks * group.size(),
                )
                stored.append(
                    ShardedTensor.from_rank_offsets(
                        key,
                        part,
                        *place,
                        slice_,
                        replica_id=replica_id,
                        prepend_axis_num=len(place),
                    )
                )
        return stored

    def merge(self, loaded: list[Tensor]) -> Tensor:
        """Undoes `split`."""
        blocks = range(0, len(loaded), self.blocks)
        return torch.stack([torch.cat(loaded[i : i + self.blocks], self.dim) for i in blocks])

    def get_extra_state(self) -> None:
        """Megatron's linear layers store an empty one."""

    def set_extra_state(self, state: Any) -> None: ...


class GroupedExperts(MegatronModule):
    """Gated MLPs of this rank's experts. Megatron's dispatcher brings tokens, and adds up what ETP
    ranks return."""

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        assert pg_collection is not None and config.moe_ffn_hidden_size is not None
        self.ep_group, self.tp_group, self.dp_group = (
            pg_collection.ep,
            pg_collection.expt_tp,
            pg_collection.expt_dp,
        )
        self.num_local_experts = num_local_experts
        hidden, width = config.hidden_size, config.moe_ffn_hidden_size // self.tp_group.size()
        self.linear_fc1 = GroupedLinear(
            (num_local_experts, 2 * width, hidden), config, dim=0, blocks=2
        )
        self.linear_fc2 = GroupedLinear((num_local_experts, hidden, width), config, dim=1, blocks=1)

    def forward(
        self, x_TD: Tensor, tokens_per_expert: Tensor, probs_T: Tensor
    ) -> tuple[Tensor, None]:
        """Tokens sorted by local expert, with the router's weight of each, in its dtype. -> [T, D]
        and no bias."""
        ends_E = torch.as_tensor(tokens_per_expert).to(x_TD.device).cumsum(0).to(torch.int32)
        return self.linear_fc2(_gated(self.linear_fc1(x_TD, ends_E), probs_T), ends_E), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Every expert is a block of its own, so that any layout loads what another one has
        saved."""
        first, count = (
            self.ep_group.rank() * self.num_local_experts,
            self.ep_group.size() * self.num_local_experts,
        )
        axis, replica = len(sharded_offsets), self.dp_group.rank()
        experts = [
            (*sharded_offsets, (axis, first + i, count)) for i in range(self.num_local_experts)
        ]
        state: dict[str, Any] = {}
        for name, linear in self.named_children():
            ours, stored = f"{prefix}{name}", f"{prefix}experts.{name}"
            split = partial(linear.split, experts, self.tp_group)
            state[f"{ours}.weight"] = ShardedTensorFactory(
                f"{stored}.weight", linear.weight, split, linear.merge, (0, 0, replica)
            )
            state[f"{ours}._extra_state"] = [
                make_sharded_object_for_checkpoint(
                    None, f"{stored}._extra_state", expert, (0, self.tp_group.rank(), replica)
                )
                for expert in experts
            ]
        return state


def _gated(both_TF: Tensor, probs_T: Tensor) -> Tensor:
    """[gate, up] -> SwiGLU, weighted by the router."""
    gate_TF, up_TF = both_TF.chunk(2, dim=-1)
    return (silu(gate_TF) * up_TF * probs_T[:, None]).to(both_TF.dtype)


def _in_order(grad: Tensor) -> Tensor:
    """The grouped product's backward pass takes no expanded gradients, and of no tokens none
    without strides."""
    return grad.contiguous() if len(grad) else grad.new_empty(grad.shape)
