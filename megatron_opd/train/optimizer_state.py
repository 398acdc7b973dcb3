"""Optimizer state in a distributed checkpoint, with torch's AdamW (no Transformer Engine, no Apex).

megatron-core 0.19.2 loads a distributed optimizer's state with faults when the inner optimizer is torch's: it lacks
the key "step", wants a step taken before the load, and gives every parameter ONE shared step tensor, which AdamW then
advances once per parameter (a silently different run). Each is put right here; without the distributed optimizer, or
with fused Adam, these do nothing.
"""

from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer

METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def sharded_state(optimizer: MegatronOptimizer, model_state: dict, metadata: dict, *, loading: bool) -> dict[str, Any]:
    """The optimizer's part of the checkpoint; with `loading`, a description of what to read into."""
    if loading:
        for part in _distributed(optimizer):
            # A dummy step creates the state; it moves the main parameters, which the load overwrites.
            part._init_optimizer_states_with_dummy_values()
    return optimizer.sharded_state_dict(model_state, is_loading=loading, metadata=metadata)


@torch.no_grad()
def load_state(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Puts a loaded state into the optimizer."""
    for part in _distributed(optimizer):
        _accept_states_without_step(part)
    optimizer.load_state_dict(state)
    for part in _distributed(optimizer):
        step = float(part.optimizer.param_groups[0]["step"])
        for values in part.optimizer.state.values():
            values["step"] = torch.tensor(step)


def _distributed(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [p for p in parts if isinstance(p, DistributedOptimizer) and isinstance(p.optimizer, torch.optim.Optimizer)]


def _accept_states_without_step(part: DistributedOptimizer) -> None:
    if "_set_main_param_and_optimizer_states" in vars(part):
        return
    original = part._set_main_param_and_optimizer_states
    part._set_main_param_and_optimizer_states = lambda param, tensors: original(param, {"step": None, **tensors})
