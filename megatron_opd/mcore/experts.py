"""All experts of a rank at once: stacked weights, and one grouped product per linear layer.

It takes the place of Megatron's `SequentialMLP` in a layer, with the same numbers and the same
checkpoint.
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
    """The same linear layer of each of E experts, without bias.

    `weight` is this rank's slice [E, outputs, inputs]. Dimension `dim` of an expert's own weight is
    sliced over the expert-tensor-parallel ranks; the weight is made of `stacked` equal matrices
    along it, each of which is sliced for itself.
    """

    def __init__(
        self, shape: tuple[int, int, int], config: TransformerConfig, *, dim: int, stacked: int
    ) -> None:
        super().__init__()
        self.dim = dim
        self.stacked = stacked
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        weight_EOI = torch.empty(shape, dtype=config.params_dtype, device=device)
        self.weight = torch.nn.Parameter(weight_EOI)
        set_tensor_model_parallel_attributes(
            self.weight, is_parallel=True, dim=dim + 1, stride=stacked
        )
        # Experts with the same replicas as the dense layers share their gradient buffer.
        spread = config.expert_model_parallel_size > 1
        same_tp = config.expert_tensor_parallel_size == config.tensor_model_parallel_size
        self.weight.allreduce = same_tp and not spread  # type: ignore[attr-defined]

    def forward(self, x_TI: Tensor, ends_E: Tensor) -> Tensor:
        """[T, outputs] of tokens sorted by expert; `ends_E`, int32, is behind each one's last."""
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
        """A tensor of the weight's shape as a checkpoint stores it.

        `experts` are the experts' places on the stored tensor's leading axes.
        """
        stored = []
        num_slices = self.stacked * group.size()
        for expert, value_OI in zip(experts, value_EOI.unbind(0), strict=True):
            for index, matrix in enumerate(value_OI.chunk(self.stacked, self.dim)):
                own = (len(expert) + self.dim, index * group.size() + group.rank(), num_slices)
                stored.append(
                    ShardedTensor.from_rank_offsets(
                        key,
                        matrix,
                        *expert,
                        own,
                        replica_id=replica_id,
                        prepend_axis_num=len(expert),
                    )
                )
        return stored

    def merge(self, loaded: list[Tensor]) -> Tensor:
        """Undoes `split`."""
        firsts = range(0, len(loaded), self.stacked)
        return torch.stack([torch.cat(loaded[i : i + self.stacked], self.dim) for i in firsts])

    def get_extra_state(self) -> None:
        """None: Megatron's linear layers store an empty state too."""

    def set_extra_state(self, state: Any) -> None: ...


class GroupedExperts(MegatronModule):
    """Gated MLPs of this rank's experts.

    Megatron's dispatcher brings the tokens, and adds up the results of expert-tensor-parallel
    ranks.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        assert pg_collection is not None and config.moe_ffn_hidden_size is not None
        self.ep_group = pg_collection.ep
        self.tp_group = pg_collection.expt_tp
        self.dp_group = pg_collection.expt_dp
        self.num_local_experts = num_local_experts
        hidden = config.hidden_size
        width = config.moe_ffn_hidden_size // self.tp_group.size()
        fc1_shape = (num_local_experts, 2 * width, hidden)
        fc2_shape = (num_local_experts, hidden, width)
        self.linear_fc1 = GroupedLinear(fc1_shape, config, dim=0, stacked=2)
        self.linear_fc2 = GroupedLinear(fc2_shape, config, dim=1, stacked=1)

    def forward(
        self, x_TD: Tensor, tokens_per_expert: Tensor, probs_T: Tensor
    ) -> tuple[Tensor, None]:
        """[T, D] of tokens sorted by local expert, and no bias.

        `probs_T` are the router's weights of the tokens, in its dtype.
        """
        ends_E = torch.as_tensor(tokens_per_expert).to(x_TD.device).cumsum(0).to(torch.int32)
        return self.linear_fc2(_gated(self.linear_fc1(x_TD, ends_E), probs_T), ends_E), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The weights as a checkpoint stores them, by expert, so that any layout loads them."""
        first = self.ep_group.rank() * self.num_local_experts
        count = self.ep_group.size() * self.num_local_experts
        axis = len(sharded_offsets)
        numbers = range(first, first + self.num_local_experts)
        experts = [(*sharded_offsets, (axis, number, count)) for number in numbers]
        replica = self.dp_group.rank()
        extra_replica = (0, self.tp_group.rank(), replica)
        state: dict[str, Any] = {}
        for name, linear in self.named_children():
            stored = f"{prefix}experts.{name}"
            split = partial(linear.split, experts, self.tp_group)
            state[f"{prefix}{name}.weight"] = ShardedTensorFactory(
                f"{stored}.weight", linear.weight, split, linear.merge, (0, 0, replica)
            )
            extra = partial(make_sharded_object_for_checkpoint, None, f"{stored}._extra_state")
            extras = [extra(expert, extra_replica) for expert in experts]
            state[f"{prefix}{name}._extra_state"] = extras
        return state


def _gated(both_TF: Tensor, probs_T: Tensor) -> Tensor:
    """SwiGLU of [gate, up], weighted by the router."""
    gate_TF, up_TF = both_TF.chunk(2, dim=-1)
    return (silu(gate_TF) * up_TF * probs_T[:, None]).to(both_TF.dtype)


def _in_order(grad: Tensor) -> Tensor:
    """The gradient in a memory order that the grouped product's backward pass takes.

    It takes no expanded gradient, and for no tokens wants usual strides.
    """
    return grad.contiguous() if len(grad) else grad.new_empty(grad.shape)
