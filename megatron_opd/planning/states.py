"""Bytes of parameters, gradients and optimizer states, from real Megatron modules without memory.

A stage of the pipeline is built on the meta device by `mcore.model.build_model`, in a world that
communicates with nobody, with one layer: all layers of the supported models are equal, so the
others are copies of it. A rank's share of the optimizer's state is taken from Megatron's own layout
of its buffers. Experts that lie on other ranks than the dense parameters have their own buffers,
sharded over the ranks that hold the same experts.
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
MAIN = 4  # bytes per element of the float32 copy of a parameter of two bytes
MOMENTS = 8  # bytes per element of Adam's two float32 moments


@dataclass(frozen=True)
class Stage:
    """The parameters of one rank of a pipeline stage, in the model's order, on the meta device."""

    before: tuple[torch.nn.Parameter, ...]  # the embedding
    layer: tuple[torch.nn.Parameter, ...]  # one of `num_layers` equal layers
    after: tuple[torch.nn.Parameter, ...]  # final norm and output layer
    num_layers: int

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """All parameters; those of a layer are copied for every layer."""
        layers = [_copy(parameter) for _ in range(self.num_layers) for parameter in self.layer]
        return [*self.before, *layers, *self.after]

    @functools.cached_property
    def num_bytes(self) -> int:
        """Bytes of a frozen copy: all memory of a teacher or reference."""
        return _bytes(self.before) + self.num_layers * _bytes(self.layer) + _bytes(self.after)

    @functools.cached_property
    def expert_bytes(self) -> int:
        """Bytes of parameters that lie on other ranks than the dense ones."""
        of_experts = tuple(p for p in self.layer if not getattr(p, "allreduce", True))
        return self.num_layers * _bytes(of_experts)

    @functools.cached_property
    def largest_of_layer(self) -> int:
        """The number of elements of a layer's largest parameter.

        Its gradient exists beside all else for a moment.
        """
        return max(parameter.numel() for parameter in self.layer)


@dataclass(frozen=True)
class TrainedBytes:
    """Bytes of a trained model on one rank, from the first update on."""

    parameters: int
    gradients: int
    optimizer: int  # main parameters and moments, without Adam's counters of 4 bytes per tensor


@functools.cache
def stages(arch: Architecture, layout: LayoutConfig, precision: str) -> list[Stage]:
    """The stages of a model, one per pipeline rank.

    All ranks of a stage have as many bytes, since sizes that do not divide are refused earlier.
    """
    pp = layout.pipeline_model_parallel_size
    # First, middle and last stage are built, and make up any number of stages.
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
    """The bytes of each stage's fullest rank of `ranks`, whose shards differ by padding."""
    return [_fullest(stage, layout, ranks) for stage in stages(arch, layout, precision)]


@functools.cache
def _fullest(stage: Stage, layout: LayoutConfig, ranks: int) -> TrainedBytes:
    return max(trained_bytes(stage, layout, ranks), key=lambda rank: rank.optimizer)


def trained_bytes(stage: Stage, layout: LayoutConfig, ranks: int) -> list[TrainedBytes]:
    """Exact bytes on each of the `ranks` of a stage after `trainer.student.prepare`."""
    tp = layout.tensor_model_parallel_size
    experts = layout.expert_parallel_size
    buffers = DistributedOptimizer.compute_full_param_layout(
        stage.parameters,
        None,
        ranks // tp,
        data_parallel_config(),
        expert_data_parallel_world_size=ranks // experts,
    ).layouts
    parameters = 0
    gradients = 0
    states = [0] * ranks
    for key, buffer in buffers.items():
        size = buffer.bucket_indices[-1][1]  # padded, so that the shards are equal
        parameters += size * key.param_dtype.itemsize
        gradients += size * 4
        # So many neighbouring ranks hold different slices of the model.
        slices = experts if key.is_expert_parallel else tp
        shards = _states_of_shards(buffer, ranks // slices)
        states = [state + shards[rank // slices] for rank, state in enumerate(states)]
    return [TrainedBytes(parameters, gradients, state) for state in states]


def _states_of_shards(buffer, shards: int) -> list[int]:
    """Bytes of the optimizer's state in each shard of a buffer's buckets."""
    states = [0] * shards
    for parameter, (start, end, bucket) in buffer.param_index_map.items():
        first, last = buffer.bucket_indices[bucket]
        width = (last - first) // shards
        for shard in range((start - first) // width, (end - 1 - first) // width + 1):
            low = first + shard * width
            elements = min(end, low + width) - max(start, low)
            states[shard] += elements * state_bytes(parameter.itemsize)
    return states


def state_bytes(element: int) -> int:
    """Bytes of the optimizer per element of a parameter, which has `element` bytes itself."""
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
    in_layer = [name.startswith("decoder.layers.0.") for name, _ in named]
    first = in_layer.index(True)
    end = first + sum(in_layer)
    parameters = tuple(parameter for _, parameter in named)
    return Stage(parameters[:first], parameters[first:end], parameters[end:], 1)


@contextlib.contextmanager
def world_of_one(rank: int, world: int) -> Iterator[None]:
    """Makes this process `rank` of a world in which every collective returns at once."""
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
    return sum(parameter.numel() * parameter.itemsize for parameter in parameters)
