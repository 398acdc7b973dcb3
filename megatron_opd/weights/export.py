"""A Megatron model as Hugging Face tensors: the refit's stream, and a model directory."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module

from megatron_opd.architectures.architecture import (
    CHANGEABLE,
    Architecture,
    config_changes,
    read_architecture,
)
from megatron_opd.architectures.ends import named_ends
from megatron_opd.errors import DataError
from megatron_opd.weights.hf import Origin, check_out_dir, write_hf
from megatron_opd.weights.load import refuse_unknown, slicing_group
from megatron_opd.weights.names import named_parameters
from megatron_opd.weights.table import Entry, hf_shapes, weight_table

if TYPE_CHECKING:
    from megatron_opd.mcore.parallel import Parallel

MAX_SHARD_BYTES = 4 * 10**9


@torch.no_grad()
def iter_hf_tensors(
    chunks: Sequence[Module], arch: Architecture, parallel: "Parallel"
) -> Iterator[tuple[str, Tensor]]:
    """Every Hugging Face tensor of the model by name, whole, in the order of the weight table.

    Collective over the model-parallel group, and with experts over the ranks that share them: all
    of them must exhaust the iterator and get the same tensors, on `parallel.device`. One Megatron
    tensor is in flight at a time. A tensor may share memory with a parameter: use or copy it before
    taking the next one, and do not write to it.
    """
    table = [entry for entry in weight_table(arch) if not entry.is_copy]
    parameters = named_parameters(chunks)
    known = {entry.megatron_name for entry in weight_table(arch)}
    refuse_unknown({name: p for name, p in parameters.items() if name not in known})
    dtype = next(iter(parameters.values())).dtype
    for entry, stage in zip(table, _owning_stages(table, parameters, parallel), strict=True):
        if entry.megatron_name in parameters:
            full = _gather(entry, parameters[entry.megatron_name], parallel)
        else:
            full = torch.empty(entry.full_shape, dtype=dtype, device=parallel.device)
        if entry.expert is not None and parallel.ep_size > 1 and stage == parallel.pp_rank:
            owner = entry.expert * parallel.ep_size // (arch.experts.count if arch.experts else 1)
            dist.broadcast(full, group=parallel.ep_group, group_src=owner)
        if parallel.pp_size > 1:
            dist.broadcast(full, group=parallel.pp_group, group_src=stage)
        yield from entry.to_hf(full).items()


def export_hf(
    chunks: Sequence[Module],
    arch: Architecture,
    parallel: "Parallel",
    source_dir: str | Path,
    out_dir: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    origin: Origin | None = None,
) -> None:
    """Writes the model as a directory that transformers and vLLM load.

    Tokenizer and config come from `source_dir`. config.json gets the architecture's values that a
    recipe may change, and generation_config.json names all tokens at which the engine stopped.

    Every rank calls it. The ranks of the first replica gather the tensors (all ranks do when the
    experts lie on several replicas), and the first rank writes them, in `dtype` or the parameters'
    own, with `origin` beside them. The directory is complete when that rank returns; others may
    return earlier. Raises DataError when `out_dir` exists or `source_dir` describes another model.
    """
    if parallel.copy_rank != 0 and parallel.ep_size * parallel.etp_group.size() == 1:
        return
    check_out_dir(out_dir)
    _check_source(source_dir, arch)
    tensors = iter_hf_tensors(chunks, arch, parallel)
    if (parallel.tp_rank, parallel.pp_rank, parallel.copy_rank) == (0, 0, 0):
        dtype = dtype or next(chunks[0].parameters()).dtype
        shapes = hf_shapes(weight_table(arch))
        changes = config_changes(source_dir, arch)
        ends = sorted(named_ends(source_dir))
        write_hf(
            out_dir, source_dir, tensors, shapes, dtype, max_shard_bytes, changes, origin, ends
        )
    else:
        for _ in tensors:
            pass


def _gather(entry: Entry, shard: Tensor, parallel: "Parallel") -> Tensor:
    """The whole Megatron tensor, contiguous, on every rank that has a slice of it."""
    group = slicing_group(entry, parallel)
    if group.size() == 1 or entry.partition.dim is None:
        return entry.gather([shard.contiguous()]).contiguous()
    shards = [torch.empty_like(shard.contiguous()) for _ in range(group.size())]
    dist.all_gather(shards, shard.contiguous(), group=group)
    return entry.gather(shards).contiguous()


def _owning_stages(
    table: Sequence[Entry], parameters: Mapping[str, Tensor], parallel: "Parallel"
) -> list[int]:
    """The pipeline rank of each entry.

    The ranks tell one another, in a small reduction, so that no split into stages is assumed.
    """
    rank = parallel.pp_rank
    stages = [rank if entry.megatron_name in parameters else -1 for entry in table]
    owners = torch.tensor(stages, device=parallel.device)
    if parallel.pp_size > 1:
        dist.all_reduce(owners, op=dist.ReduceOp.MAX, group=parallel.pp_group)
    if parallel.ep_size > 1:
        dist.all_reduce(owners, op=dist.ReduceOp.MAX, group=parallel.ep_group)
    stages = owners.tolist()
    if -1 in stages:
        raise ValueError(f"no stage of the model has {table[stages.index(-1)].megatron_name}")
    return stages


def _check_source(source_dir: str | Path, arch: Architecture) -> None:
    source = asdict(read_architecture(source_dir))
    for field, value in asdict(arch).items():
        if source[field] != value and field not in CHANGEABLE:
            raise DataError(
                f"{Path(source_dir) / 'config.json'}: {field} is {source[field]}, the model's is "
                f"{value}"
            )
