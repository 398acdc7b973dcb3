"""Optimizer state in a distributed checkpoint, by parameter, so that any layout loads it.

Stored are Adam's two moments and the float32 parameters, in the shapes and under the names of the
model's own tensors, and the number of updates. An optimizer's other values (learning rate, weight
decay) come from the recipe.

megatron-core 0.19.2's own state dict would not do. It stores how many optimizers share the work,
which depends on the layout. With an embedding that two pipeline stages share, it takes the numbers
of the last stage's parameters from places shifted by the padding between its buckets, so that a
resumed run silently starts from other weights. When the inner optimizer is torch's AdamW (no
Transformer Engine, no Apex), it gives every parameter ONE step tensor, which AdamW advances once
per parameter. Here Megatron only tells which share of a parameter's state lies on this rank.
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor
from torch.nn import Parameter

_KEYS = ("param", "exp_avg", "exp_avg_sq")


def create_moments(optimizer: MegatronOptimizer) -> None:
    """Makes Adam's state before the first update: moments of zero and a count of 0.

    An engine that starts afterwards then measures the memory that is left. Megatron makes the
    moments by a step with gradients of zero, here at a learning rate of 0, since weight decay would
    change the parameters.
    """
    for member in _members(optimizer):
        groups = member.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = 0.0
        member._init_optimizer_states_with_dummy_values()
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        _set_updates(member, 0.0)


@torch.no_grad()
def sharded_state(
    optimizer: MegatronOptimizer, model_state: dict[str, Any], *, loading: bool
) -> dict[str, Any]:
    """The optimizer's entries of the checkpoint, or with `loading` their descriptions. Collective.

    `model_state` is the sharded state dict of all chunks, which has the place of each parameter in
    the whole model.
    """
    tensors, _ = extract_sharded_tensors_and_factories(model_state)
    described = {sharded.data: sharded for sharded in nested_values(tensors)}
    members = _members(optimizer)
    states: dict[str, Any] = {}
    for member in members:
        for parameter, bounds in _parameters(member):
            state = _empty(parameter) if loading else _whole(member, parameter, bounds)
            entry = described[parameter]
            states[str(len(states))] = {key: _as(entry, key, state[key]) for key in _KEYS}
    return {"states": states, "updates": 0.0 if loading else _updates(members[0])}


@torch.no_grad()
def load_state(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Puts a loaded state into the optimizer: this rank's share of every parameter."""
    number = itertools.count()
    for member in _members(optimizer):
        for parameter, bounds in _parameters(member):
            loaded = state["states"][str(next(number))]
            if bounds is not None:
                own = member._get_main_param_and_optimizer_states(parameter)
                for key in _KEYS:
                    if key in own:
                        own[key].copy_(loaded[key].flatten()[slice(*bounds)])
        _set_updates(member, state["updates"])


def _members(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """The optimizers that Megatron chains: for dense parameters, and for experts over ranks."""
    members = getattr(optimizer, "chained_optimizers", [optimizer])
    assert all(isinstance(member, DistributedOptimizer) for member in members), "see student.py"
    return [member for member in members if not member.is_stub_optimizer]


def _parameters(
    member: DistributedOptimizer,
) -> Iterator[tuple[Parameter, tuple[int, int] | None]]:
    """Every parameter, in the same order on all replicas, with the bounds of this rank's numbers.

    None for a parameter that this rank does not update.
    """
    for buffer, ranges in zip(member.buffers, member.gbuf_ranges, strict=True):
        bounds: dict[Parameter, tuple[int, int]] = {}
        for bucket in itertools.chain.from_iterable(ranges.values()):
            for parameter, places in bucket["param_map"].items():
                bounds[parameter] = (places["param"].start, places["param"].end)
        for parameter in buffer.param_index_map:
            yield parameter, bounds.get(parameter)


def _empty(parameter: Parameter) -> dict[str, Tensor]:
    return {key: torch.empty(parameter.shape, dtype=torch.float32) for key in _KEYS}


def _whole(
    member: DistributedOptimizer, parameter: Parameter, bounds: tuple[int, int] | None
) -> dict[str, Tensor]:
    """A parameter's state on the host: the sum of the replicas' shares, with zeros around them."""
    full = torch.zeros(len(_KEYS), parameter.numel(), dtype=torch.float32, device=parameter.device)
    if bounds is not None:
        own = member._get_main_param_and_optimizer_states(parameter)
        for row, key in zip(full, _KEYS, strict=True):
            row[slice(*bounds)] = own[key]
    dist.all_reduce(full, group=member.data_parallel_group)
    return {key: row.view(parameter.shape).cpu() for row, key in zip(full, _KEYS, strict=True)}


def _as(described: Any, key: str, value: Tensor) -> Any:
    """`value` as tensor `optimizer.state.<key>` of the parameter that `described` describes."""
    changes: dict[str, Any] = {"key": f"optimizer.state.{key}.{described.key}", "data": value}
    if not isinstance(described, ShardedTensorFactory):
        changes["dtype"] = value.dtype
    return replace(described, **changes)


def _updates(member: DistributedOptimizer) -> float:
    """The count of updates, which torch keeps per parameter and fused optimizers per group."""
    counts = [values["step"] for values in member.optimizer.state.values() if "step" in values]
    counts += [group["step"] for group in member.optimizer.param_groups if "step" in group]
    return float(counts[0]) if counts else 0.0


def _set_updates(member: DistributedOptimizer, updates: float) -> None:
    for values in member.optimizer.state.values():
        if "step" in values:
            values["step"] = torch.tensor(updates)
    for group in member.optimizer.param_groups:
        if "step" in group:
            group["step"] = int(updates)
