"""A Hugging Face checkpoint into a Megatron model: each rank reads the tensors of its stage and keeps its slices."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Module

from megatron_opd.config.architecture import Architecture
from megatron_opd.errors import DataError
from megatron_opd.weights.hf import HfCheckpoint
from megatron_opd.weights.names import named_parameters
from megatron_opd.weights.table import Entry, weight_table

if TYPE_CHECKING:  # a checkpoint is checked before Megatron, which takes seconds to import, is needed
    from megatron_opd.mcore.parallel import Parallel

# Constants that old checkpoints hold beside the weights.
IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")
TIED_HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def check_hf(model_dir: str | Path, arch: Architecture) -> HfCheckpoint:
    """Opens a checkpoint and holds its names and shapes against the table, from the file headers.

    Raises DataError naming a missing, unexpected or misshapen tensor, or an output layer that is not the embedding
    although the config ties them. Needs no process group.
    """
    checkpoint = HfCheckpoint(model_dir)
    expected = hf_shapes(weight_table(arch))
    for name, shape in expected.items():
        if name not in checkpoint.shapes:
            raise DataError(f"{model_dir}: tensor {name} is missing; its config.json describes another model")
        if checkpoint.shapes[name] != shape:
            found = checkpoint.shapes[name]
            raise DataError(f"{model_dir}: tensor {name} has shape {found}; its config.json says {shape}")
        if isinstance(checkpoint.dtypes[name], str):
            raise DataError(f"{model_dir}: tensor {name} is {checkpoint.dtypes[name]}; save the model as BF16 or F32")
    for name in checkpoint.shapes:
        if name not in expected and not IGNORED.search(name) and not (arch.tie_word_embeddings and name == TIED_HEAD):
            raise DataError(f"{model_dir}: tensor {name} is unexpected; its config.json describes another model")
    if arch.tie_word_embeddings and TIED_HEAD in checkpoint.shapes:
        _check_tied(checkpoint)
    return checkpoint


def hf_shapes(table: Sequence[Entry]) -> dict[str, tuple[int, ...]]:
    """Every checkpoint tensor the table knows, in its order."""
    return {name: shape for entry in table if not entry.is_copy for name, shape in entry.hf_shapes.items()}


@torch.no_grad()
def load_hf(chunks: Sequence[Module], model_dir: str | Path, arch: Architecture, parallel: "Parallel") -> None:
    """Fills every parameter of `chunks` exactly once, cast to its dtype. Each rank works for itself.

    Raises DataError when the checkpoint is not a whole model of `arch` (see `check_hf`), or float16 cannot hold it.
    """
    checkpoint = check_hf(model_dir, arch)
    parameters = named_parameters(chunks)
    for entry in weight_table(arch):
        parameter = parameters.pop(entry.megatron_name, None)
        if parameter is None:
            continue  # another stage's, or another rank's expert
        parts = [checkpoint.read(name) for name in entry.hf_names]
        group = slicing_group(entry, parallel)
        parameter.copy_(entry.shard(parts, group.rank(), group.size(), tuple(parameter.shape)))
        if parameter.dtype is torch.float16 and not parameter.isfinite().all():
            raise DataError(
                f"{model_dir}: tensor {entry.hf_names[0]} holds numbers beyond float16's range; set "
                "precision=bfloat16 or float32"
            )
    refuse_unknown(parameters)


def slicing_group(entry: Entry, parallel: "Parallel") -> ProcessGroup:
    """The ranks among which an entry's tensor is partitioned."""
    return parallel.tp_group if entry.expert is None else parallel.etp_group


def refuse_unknown(parameters: Mapping[str, Tensor]) -> None:
    """Raises ValueError when the model has parameters that the table does not: it is of another architecture."""
    if parameters:
        raise ValueError(f"no entry in the weight table for {', '.join(parameters)}")


def _check_tied(checkpoint: HfCheckpoint) -> None:
    head, embedding = checkpoint.read(TIED_HEAD), checkpoint.read(EMBEDDING)
    if head.shape != embedding.shape or not torch.equal(head, embedding):
        raise DataError(
            f"{checkpoint.model_dir}: config.json ties the word embeddings, but {TIED_HEAD} differs from {EMBEDDING}; "
            "set tie_word_embeddings to false there, or remove the tensor"
        )
