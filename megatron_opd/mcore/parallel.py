"""Process groups: one `Parallel` per layout, and the only file that touches global state of the
process.

Megatron-Core still reads its module-level groups (`parallel_state`) in places. A process here can
hold models of different layouts (a student at TP1 beside a teacher at TP4), so each `Parallel`
keeps the globals of its layout, and `with parallel.active():` puts them in force around every use
of a model.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_opd.architectures.config import LayoutConfig
from megatron_opd.mcore.host import prepare_platform
from megatron_opd.world.channel import Channel
from megatron_opd.world.device import backend, device


@dataclass(frozen=True)
class Parallel:
    """The groups of one layout, as this rank sees them."""

    layout: LayoutConfig
    groups: ProcessGroupCollection
    device: torch.device
    _globals: dict[str, Any]

    @property
    def tp_group(self) -> dist.ProcessGroup:
        return self.groups.tp

    @property
    def pp_group(self) -> dist.ProcessGroup:
        return self.groups.pp

    @property
    def tp_size(self) -> int:
        return self.groups.tp.size()

    @property
    def tp_rank(self) -> int:
        return self.groups.tp.rank()

    @property
    def pp_size(self) -> int:
        return self.groups.pp.size()

    @property
    def pp_rank(self) -> int:
        return self.groups.pp.rank()

    @property
    def num_chunks(self) -> int:
        """Model chunks on every rank; more than one only with interleaved pipeline stages."""
        return self.layout.virtual_pipeline_model_parallel_size

    @property
    def dp_size(self) -> int:
        return self.groups.dp.size()

    @property
    def dp_rank(self) -> int:
        return self.groups.dp.rank()

    @property
    def copy_rank(self) -> int:
        """Index of this rank among the replicas of its non-expert weights."""
        return self.groups.dp_cp.rank()

    @property
    def cp_size(self) -> int:
        return self.groups.cp.size()

    @property
    def cp_rank(self) -> int:
        return self.groups.cp.rank()

    @property
    def ep_group(self) -> dist.ProcessGroup:
        return self.groups.ep

    @property
    def ep_size(self) -> int:
        return self.groups.ep.size()

    @property
    def ep_rank(self) -> int:
        return self.groups.ep.rank()

    @property
    def etp_group(self) -> dist.ProcessGroup:
        return self.groups.expt_tp

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def is_signal_source(self) -> bool:
        """The last stage's first tensor rank holds the results of a forward pass, for the tokens
        that it was given."""
        return self.is_last_stage and self.tp_rank == 0

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Puts this layout's groups in force in `megatron.core.parallel_state`."""
        before = _snapshot()
        vars(parallel_state).update(self._globals)
        try:
            yield
        finally:
            vars(parallel_state).update(before)


def _snapshot() -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(parallel_state).items()
        if name[0] == "_" and name[1:].isupper()
    }


def start(timeout_minutes: float = 30.0, *, apart: dict[str, int] | None = None) -> None:
    """Prepares the device and joins the default process group (of one process when torchrun did not
    start us).

    `apart`: role -> processes set aside for it, the last ones, in this order. Each role has a
    default group of its own, and a channel joins it to the processes that are left, the student's.
    """
    prepare_platform()
    if dist.is_initialized():
        return
    timeout = timedelta(minutes=timeout_minutes)
    if "RANK" not in os.environ:
        store = dist.HashStore()
        dist.init_process_group(backend(), store=store, rank=0, world_size=1)
    elif apart:
        _start_apart(apart, timeout)
    else:
        dist.init_process_group(backend(), timeout=timeout)


_channels: dict[str, Channel] = {}


def _start_apart(apart: dict[str, int], timeout: timedelta) -> None:
    """The student's processes are the first, so that the rank whose output people read is 0."""
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    student = world = range(world_size - sum(apart.values()))
    first = len(student)
    for role, size in apart.items():
        serving = range(first, first + size)
        first += size
        if rank in serving:
            world = serving
        if rank in serving or rank in student:
            _channels[role] = Channel(dist.PrefixStore(role, store), rank, student, serving)
    store = dist.PrefixStore(f"world from {world[0]}", store)
    dist.init_process_group(
        backend(), store=store, rank=rank - world[0], world_size=len(world), timeout=timeout
    )


def channel(role: str) -> Channel | None:
    """Between the student's processes and those of `role`; None where they are the same."""
    return _channels.get(role)


def own_role() -> str | None:
    """What this process is set aside for; None for the student's."""
    return next((role for role, each in _channels.items() if each.serves), None)


# (TP, PP, EP, ETP, CP) -> the groups of that shape and Megatron's globals of it. They are never
# freed before `stop()`: gloo keeps three polling threads for each of the twenty or so that Megatron
# makes, so equal layouts must share theirs.
_created: dict[tuple[int, ...], tuple[ProcessGroupCollection, dict[str, Any]]] = {}


def create(layout: LayoutConfig) -> Parallel:
    """Collective over the world: the groups of `layout`. The data-parallel size is world / (TP x PP
    x CP).

    The experts of a stage lie on EP x ETP of its ranks, whatever tensor- or data-parallel rank
    these have. Layouts of the same sizes share one set of groups.
    """
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    experts = layout.expert_model_parallel_size, layout.expert_tensor_parallel_size
    shape = tp, pp, *experts, layout.context_parallel_size
    if shape not in _created:
        _created[shape] = _initialize(*shape)
    groups, megatron_globals = _created[shape]
    chunks = layout.virtual_pipeline_model_parallel_size
    interleaving = {
        "_VIRTUAL_PIPELINE_MODEL_PARALLEL_WORLD_SIZE": chunks if chunks > 1 else None,
        "_VIRTUAL_PIPELINE_MODEL_PARALLEL_RANK": 0 if chunks > 1 else None,
    }
    return Parallel(layout, groups, device(), megatron_globals | interleaving)


def _initialize(
    tp: int, pp: int, ep: int, etp: int, cp: int
) -> tuple[ProcessGroupCollection, dict[str, Any]]:
    assert not parallel_state.is_initialized(), "create() is called outside of active()"
    empty = _snapshot()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        create_gloo_process_groups=False,  # for optimizer states that travel through the host
    )
    # Dropout is 0 everywhere: the seed only satisfies Megatron's tracker, which some forward passes
    # enter.
    model_parallel_cuda_manual_seed(0)
    created = ProcessGroupCollection.use_mpu_process_groups(), _snapshot()
    vars(parallel_state).update(empty)
    return created


def stop() -> None:
    """Leaves the default process group, and all others with it."""
    _created.clear()
    _channels.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


# ---------------------------------------------------------------------- lists spread over the world
def share[T](items: list[T]) -> list[T]:
    """This rank's part of a list that every rank holds."""
    return items[dist.get_rank() :: dist.get_world_size()]


def gather_shares[T](mine: list[T]) -> list[T]:
    """The inverse of `share` for results made one per item: every rank gets all, in the order of
    the items."""
    parts: list[list[T]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, mine)
    whole: list[T] = []
    for i in range(max(len(part) for part in parts)):
        whole += [part[i] for part in parts if i < len(part)]
    return whole


def any_rank(flag: bool, where: torch.device) -> bool:
    """Whether `flag` is true on at least one rank. Collective."""
    value = torch.tensor(int(flag), device=where)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return bool(value.item())


def from_rank_0[T](work: Callable[[], T]) -> T:
    """What `work`, done by rank 0 alone, returns or raises, on every rank. Collective; it must be
    picklable."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    result, failure = outcome
    if failure is not None:
        raise failure
    return result
