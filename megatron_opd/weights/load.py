"""Loads a Hugging Face checkpoint into a Megatron model: each rank reads and keeps its slices."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Module

from megatron_opd.architectures.architecture import Architecture
from megatron_opd.errors import DataError
from megatron_opd.weights.check import EMBEDDING, TIED_HEAD, check_headers, not_tied
from megatron_opd.weights.hf import HfCheckpoint
from megatron_opd.weights.names import named_parameters
from megatron_opd.weights.table import Entry, weight_table

# A checkpoint is checked before Megatron, which takes seconds to import, is needed.
if TYPE_CHECKING:
    from megatron_opd.mcore.parallel import Parallel


def check_hf(model_dir: str | Path, arch: Architecture) -> HfCheckpoint:
    """Opens a checkpoint whose headers are those of `arch`. Needs no process group.

    Raises DataError as `check_headers` does, also when the output layer is not the embedding
    although the config ties them.
    """
    checkpoint = HfCheckpoint(model_dir, check_headers(Path(model_dir), arch))
    if arch.tie_word_embeddings and TIED_HEAD in checkpoint.shapes:
        _check_tied(checkpoint)
    return checkpoint


@torch.no_grad()
def load_hf(
    chunks: Sequence[Module], model_dir: str | Path, arch: Architecture, parallel: "Parallel"
) -> None:
    """Fills every parameter of `chunks` exactly once, cast to its dtype, without communication.

    Raises DataError when the checkpoint is not a whole model of `arch` (see `check_hf`), or float16
    cannot hold it.
    """
    checkpoint = check_hf(model_dir, arch)
    parameters = named_parameters(chunks)
    for entry in weight_table(arch):
        parameter = parameters.pop(entry.megatron_name, None)
        if parameter is None:
            continue  # another stage's, or another rank's expert
        tensors = [checkpoint.read(name) for name in entry.hf_names]
        group = slicing_group(entry, parallel)
        parameter.copy_(entry.shard(tensors, group.rank(), group.size(), tuple(parameter.shape)))
        if parameter.dtype is torch.float16 and not parameter.isfinite().all():
            raise DataError(
                f"{model_dir}: tensor {entry.hf_names[0]} holds numbers beyond float16's range; "
                "set precision=bfloat16 or float32"
            )
    refuse_unknown(parameters)


def slicing_group(entry: Entry, parallel: "Parallel") -> ProcessGroup:
    """The ranks among which an entry's tensor is partitioned."""
    return parallel.tp_group if entry.expert is None else parallel.etp_group


def refuse_unknown(parameters: Mapping[str, Tensor]) -> None:
    """Raises ValueError for parameters that are not in the table: of another architecture."""
    if parameters:
        raise ValueError(f"no entry in the weight table for {', '.join(parameters)}")


def _check_tied(checkpoint: HfCheckpoint) -> None:
    head = checkpoint.read(TIED_HEAD)
    embedding = checkpoint.read(EMBEDDING)
    if head.shape != embedding.shape or not torch.equal(head, embedding):
        raise not_tied(checkpoint.model_dir)
