"""Bytes of parameters, gradients and optimizer states, from real Megatron modules on the meta
device.

A stage of the pipeline is built by `mcore.model.build_model` in a world that communicates with
nobody, with one layer: all layers of the supported models are equal, so the others are copies of
it. What a rank keeps of the optimizer's state is what Megatron's own layout of its buffers says:
experts have buffers of their own where they are spread otherwise than the dense parameters, sharded
over the ranks that hold the same experts.
"""

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_opd.architectures.architecture import Architecture
from megatron_opd.architectures.config import LayoutConfig
from megatron_opd.mcore import parallel as groups
from megatron_opd.mcore.model import build_model
from megatron_opd.trainer.student import data_parallel_config
from megatron_opd.world import processes

META = torch.device("meta")
# bytes per element: the float32 copy of a parameter of two bytes; Adam's two float32 moments
MAIN, MOMENTS = 4, 8


@dataclass(frozen=True)
class Stage:
    """The parameters of one rank of a pipeline stage, in the model's order, on the meta device."""

    before: tuple[torch.nn.Parameter, ...]  # the embedding
    layer: tuple[torch.nn.Parameter, ...]  # of each of `num_layers` equal ones
    after: tuple[torch.nn.Parameter, ...]  # final norm and output layer
    num_layers: int

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        layers = [_copy(each) for _ in range(self.num_layers) for each in self.layer]
        return [*self.before, *layers, *self.after]

    @functools.cached_property
    def num_bytes(self) -> int:
        """Bytes of a frozen copy: a teacher's or reference's whole share of memory."""
        return _bytes(self.before) + self.num_layers * _bytes(self.layer) + _bytes(self.after)

    @functools.cached_property
    def expert_bytes(self) -> int:
        """Bytes that are spread over ranks otherwise than the dense parameters."""
        return self.num_layers * _bytes(
            tuple(each for each in self.layer if not getattr(each, "allreduce", True))
        )

    @functools.cached_property
    def largest_of_layer(self) -> int:
        """Elements of a layer's largest parameter, whose gradient exists beside everything else for
        a moment."""
        return max(each.numel() for each in self.layer)


@dataclass(frozen=True)
class TrainedBytes:
    """What one rank of a trained model holds from the first update on."""

    parameters: int
    gradients: int
    optimizer: int  # main parameters and moments; Adam's step counters, 4 bytes per tensor, apart


@functools.cache
def stages(arch: Architecture, layout: LayoutConfig, precision: str) -> list[Stage]:
    """One per pipeline rank. The ranks of a stage hold equally much: sizes that do not divide are
    refused earlier."""
    pp = layout.pipeline_model_parallel_size
    # Three stages are the first, one between, and the last; two and more than three are made of
    # these.
    small = replace(arch, num_layers=1 if pp == 1 else 3)
    sizes = LayoutConfig(
        layout.tensor_model_parallel_size,
        small.num_layers,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        expert_tensor_parallel_size=layout.expert_tensor_parallel_size,
    )
    built = _one_layer_stages(small, sizes, precision)
    roles = [0, *[1] * (pp - 2), 2] if pp > 1 else [0]
    return [replace(built[role], num_layers=arch.num_layers // pp) for role in roles]


@functools.cache
def trained_stages(
    arch: Architecture, layout: LayoutConfig, precision: str, ranks: int
) -> list[TrainedBytes]:
    """One per pipeline rank: of the `ranks` of a stage, whose shards differ by padding, the
    fullest."""
    return [_fullest(stage, layout, ranks) for stage in stages(arch, layout, precision)]


@functools.cache
def _fullest(stage: Stage, layout: LayoutConfig, ranks: int) -> TrainedBytes:
    return max(trained_bytes(stage, layout, ranks), key=lambda held: held.optimizer)


def trained_bytes(stage: Stage, layout: LayoutConfig, ranks: int) -> list[TrainedBytes]:
    """Bytes on each of the `ranks` of a pipeline stage after `trainer.student.prepare`. Exact."""
    tp, experts = layout.tensor_model_parallel_size, layout.expert_parallel_size
    buffers = DistributedOptimizer.compute_full_param_layout(
        stage.parameters,
        None,
        ranks // tp,
        data_parallel_config(),
        expert_data_parallel_world_size=ranks // experts,
    ).layouts
    held_bytes = gradients = 0
    states = [0] * ranks
    for key, buffer in buffers.items():
        size = buffer.bucket_indices[-1][1]  # padded, so that the shards are equal
        held_bytes, gradients = held_bytes + size * key.param_dtype.itemsize, gradients + size * 4
        # neighbouring ranks hold different parts of the model
        parts = experts if key.is_expert_parallel else tp
        shards = _states_of_shards(buffer, ranks // parts)
        states = [state + shards[rank // parts] for rank, state in enumerate(states)]
    return [TrainedBytes(held_bytes, gradients, state) for state in states]


def _states_of_shards(buffer, shards: int) -> list[int]:
    """Bytes of the optimizer's state for the parts of parameters that lie in each shard of the
    buckets."""
    found = [0] * shards
    for parameter, (start, end, bucket) in buffer.param_index_map.items():
        first, last = buffer.bucket_indices[bucket]
        width = (last - first) // shards
        for shard in range((start - first) // width, (end - 1 - first) // width + 1):
            low = first + shard * width
            found[shard] += (min(end, low + width) - max(start, low)) * state_bytes(
                parameter.itemsize
            )
    return found


def state_bytes(element: int) -> int:
    """Bytes of the optimizer per element of a parameter whose elements have so many."""
    return MOMENTS + (MAIN if element < MAIN else 0)


@functools.cache
def _one_layer_stages(arch: Architecture, layout: LayoutConfig, precision: str) -> list[Stage]:
    pp = arch.num_layers
    world = math.lcm(layout.model_parallel_size, layout.expert_parallel_size * pp)
    return [_build(arch, layout, precision, stage * world // pp, world) for stage in range(pp)]


def _build(
    arch: Architecture, layout: LayoutConfig, precision: str, rank: int, world: int
) -> Stage:
    with world_of_one(rank, world), META:
        parallel = replace(groups.create(layout), device=META)
        (chunk,) = build_model(arch, parallel, precision=precision)
        named = list(chunk.named_parameters())
    (first, *_) = inside = [
        i for i, (name, _) in enumerate(named) if name.startswith("decoder.layers.0.")
    ]
    parameters = [parameter for _, parameter in named]
    end = first + len(inside)
    return Stage(
        tuple(parameters[:first]), tuple(parameters[first:end]), tuple(parameters[end:]), 1
    )


@contextlib.contextmanager
def world_of_one(rank: int, world: int) -> Iterator[None]:
    """This process as `rank` of a world in which every collective returns at once."""
    assert not dist.is_initialized(), "planning has its own default process group"
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        processes.start()
        yield
    finally:
        processes.stop()


def _copy(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    copy = torch.nn.Parameter(parameter.detach())
    for name in ("allreduce", "shared_embedding"):
        if hasattr(parameter, name):
            setattr(copy, name, getattr(parameter, name))
    return copy


def _bytes(parameters: tuple[torch.nn.Parameter, ...]) -> int:
    return sum(each.numel() * each.itemsize for each in parameters)
