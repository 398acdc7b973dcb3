"""Process groups: one `Parallel` per layout, and the only file that touches Megatron-Core's global
state.

Megatron-Core still reads its module-level groups (`parallel_state`) in places. A process here can
hold models of different layouts (a student at TP1 beside a teacher at TP4), so each `Parallel`
keeps the globals of its layout, and `with parallel.active():` puts them in force around every use
of a model.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_opd.architectures.config import LayoutConfig
from megatron_opd.mcore.host import prepare_platform
from megatron_opd.world import processes
from megatron_opd.world.device import device


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


# (TP, PP, EP, ETP, CP) -> the groups of that shape and Megatron's globals of it. They are never
# freed before the processes stop: gloo keeps three polling threads for each of the twenty or so
# that Megatron makes, so equal layouts must share theirs.
_created: dict[tuple[int, ...], tuple[ProcessGroupCollection, dict[str, Any]]] = {}


def create(layout: LayoutConfig) -> Parallel:
    """Collective over the world: the groups of `layout`. The data-parallel size is world / (TP x PP
    x CP).

    The experts of a stage lie on EP x ETP of its ranks, whatever tensor- or data-parallel rank
    these have. Layouts of the same sizes share one set of groups.
    """
    tp = layout.tensor_model_parallel_size
    pp = layout.pipeline_model_parallel_size
    experts = layout.expert_model_parallel_size, layout.expert_tensor_parallel_size
    shape = tp, pp, *experts, layout.context_parallel_size
    if shape not in _created:
        prepare_platform()
        _created[shape] = _initialize(*shape)
        processes.when_stopped(_created.clear)
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
