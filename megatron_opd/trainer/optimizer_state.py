"""Optimizer state in a distributed checkpoint: by parameter, whatever the layout that wrote it.

Stored are Adam's two moments and the float32 parameters, in the shapes and under the names of the
model's own tensors, and the number of updates. All else an optimizer holds (learning rate, weight
decay) comes from the recipe.

megatron-core 0.19.2's own state dict would not do. It stores how many optimizers share the work,
which depends on the layout. With an embedding that two pipeline stages share, it takes the numbers
of the last stage's parameters from places shifted by the padding between its buckets: a resumed run
silently starts from other weights. Where the inner optimizer is torch's AdamW (no Transformer
Engine, no Apex), it gives every parameter ONE step tensor, which AdamW advances once per parameter.
What is used here is only where a parameter's share of the state lies on this rank.
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
    """Makes what Adam holds: moments of zero and a count of no updates, as its first step would.

    An engine that starts afterwards finds their memory taken. Megatron makes them by a step with
    gradients of zero; at a learning rate of 0, without which weight decay would move them, the
    parameters keep their bits.
    """
    for part in _parts(optimizer):
        groups = part.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = 0.0
        part._init_optimizer_states_with_dummy_values()
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        _set_updates(part, 0.0)


@torch.no_grad()
def sharded_state(
    optimizer: MegatronOptimizer, model_state: dict[str, Any], *, loading: bool
) -> dict[str, Any]:
    """The optimizer's part of the checkpoint; with `loading`, a description of what to read.
    Collective.

    `model_state`: the sharded state dict of all chunks, which says what each parameter is in the
    whole model.
    """
    tensors, _ = extract_sharded_tensors_and_factories(model_state)
    described = {sharded.data: sharded for sharded in nested_values(tensors)}
    parts = _parts(optimizer)
    states: dict[str, Any] = {}
    for part in parts:
        for parameter, bounds in _parameters(part):
            state = _empty(parameter) if loading else _whole(part, parameter, bounds)
            states[str(len(states))] = {
                key: _as(described[parameter], key, state[key]) for key in _KEYS
            }
    return {"states": states, "updates": 0.0 if loading else _updates(parts[0])}


@torch.no_grad()
def load_state(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Puts a loaded state into the optimizer: of every parameter, the share that this rank
    updates."""
    number = itertools.count()
    for part in _parts(optimizer):
        for parameter, bounds in _parameters(part):
            whole = state["states"][str(next(number))]
            if bounds is not None:
                for key, mine in part._get_main_param_and_optimizer_states(parameter).items():
                    if key in _KEYS:
                        mine.copy_(whole[key].flatten()[slice(*bounds)])
        _set_updates(part, state["updates"])


def _parts(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """One optimizer for the dense parameters and, where experts are spread over ranks, one for
    these."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    assert all(isinstance(part, DistributedOptimizer) for part in parts), "see train.student"
    return [part for part in parts if not part.is_stub_optimizer]


def _parameters(part: DistributedOptimizer) -> Iterator[tuple[Parameter, tuple[int, int] | None]]:
    """Every parameter, in the same order on all replicas, and which of its numbers this rank
    updates."""
    for buffer, ranges in zip(part.buffers, part.gbuf_ranges, strict=True):
        mine = {
            parameter: (found["param"].start, found["param"].end)
            for buckets in ranges.values()
            for bucket in buckets
            for parameter, found in bucket["param_map"].items()
        }
        for parameter in buffer.param_index_map:
            yield parameter, mine.get(parameter)


def _empty(parameter: Parameter) -> dict[str, Tensor]:
    return {key: torch.empty(parameter.shape, dtype=torch.float32) for key in _KEYS}


def _whole(
    part: DistributedOptimizer, parameter: Parameter, bounds: tuple[int, int] | None
) -> dict[str, Tensor]:
    """A parameter's state on the host: the sum of the replicas' shares, each with zeros around
    it."""
    full = torch.zeros(len(_KEYS), parameter.numel(), dtype=torch.float32, device=parameter.device)
    if bounds is not None:
        mine = part._get_main_param_and_optimizer_states(parameter)
        for row, key in zip(full, _KEYS, strict=True):
            row[slice(*bounds)] = mine[key]
    dist.all_reduce(full, group=part.data_parallel_group)
    return {key: row.view(parameter.shape).cpu() for row, key in zip(full, _KEYS, strict=True)}


def _as(described: Any, key: str, value: Tensor) -> Any:
    """`value` as the tensor `optimizer.state.<key>` of the parameter that `described` names and
    places."""
    changes: dict[str, Any] = {"key": f"optimizer.state.{key}.{described.key}", "data": value}
    if not isinstance(described, ShardedTensorFactory):
        changes["dtype"] = value.dtype
    return replace(described, **changes)


def _updates(part: DistributedOptimizer) -> float:
    """torch counts per parameter, fused optimizers per group."""
    counts = [values["step"] for values in part.optimizer.state.values() if "step" in values]
    counts += [group["step"] for group in part.optimizer.param_groups if "step" in group]
    return float(counts[0]) if counts else 0.0


def _set_updates(part: DistributedOptimizer, updates: float) -> None:
    for values in part.optimizer.state.values():
        if "step" in values:
            values["step"] = torch.tensor(updates)
    for group in part.optimizer.param_groups:
        if "step" in group:
            group["step"] = int(updates)
