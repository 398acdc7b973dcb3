"""Loads a distributed checkpoint into a sharded state dict without running code that it names.

`megatron.core.dist_checkpointing.load` (0.19.2) unpickles `.metadata` and `common.pt`, and loads
every stored object with `torch.load(weights_only=False)`; it takes no other reader. This module
does the same steps with readers that refuse all but tensors and plain values. `common.pt`, of older
checkpoints, is not read at all.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.dict_utils import merge, nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    apply_factory_merges,
)
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies import torch as strategy
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from megatron.core.dist_checkpointing.validation import (
    determine_global_metadata,
    validate_sharding_integrity,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from megatron_opd.errors import DataError
from megatron_opd.weights.metadata import read_metadata

_COMMON = ShardedObject("common_state", None, (1,), (0,)).unique_key


def load(sharded_state: dict[str, Any], directory: Path, *, common: bool = False) -> dict[str, Any]:
    """`sharded_state` with the stored values in place of their descriptions. Collective.

    `common` adds the plain values that are the same on all ranks. Raises DataError naming the file
    that is missing, damaged, or holds anything but tensors and plain values.
    """
    metadata = read_metadata(directory)
    described, state, factories = load_preprocess(sharded_state)
    if common:
        merge(state, _read({_COMMON: io.BytesIO()}, directory, metadata)[_COMMON][0])
    described, _ = extract_sharded_base(described)
    validate_sharding_integrity(determine_global_metadata(described)[1])
    merge(state, _sharded(described, directory, metadata))
    return apply_factory_merges(state, factories)


def _sharded(described: dict[str, Any], directory: Path, metadata: Metadata) -> dict[str, Any]:
    """Loads the shards, in the steps of Megatron's `TorchDistLoadShardedStrategy.load`."""
    flat, flat_mapping, renamed = strategy._replace_state_dict_keys_with_sharded_keys(described)
    tensors = [value for value in nested_values(described) if isinstance(value, ShardedTensor)]
    read = _read(strategy.mcore_to_pyt_state_dict(flat, True), directory, metadata, tensors)
    values = {key: strategy._unwrap_pyt_sharded_tensor(value) for key, value in read.items()}
    state = strategy._replace_sharded_keys_with_state_dict_keys(values, flat_mapping, renamed)
    strategy._restore_dict_types(state, described)
    return state


def _read(
    wanted: dict[str, Any],
    directory: Path,
    metadata: Metadata,
    tensors: Sequence[ShardedTensor] = (),
) -> dict[str, Any]:
    """`wanted` with its tensors filled, and its streams replaced by the stored objects."""
    fixed = [tensor for tensor in tensors if not tensor.allow_shape_mismatch]
    padded = {tensor.key: tensor for tensor in tensors if tensor.allow_shape_mismatch}
    planner = _Planner(
        directory,
        shapes_validation_sharded_tensors=fixed,
        allow_shape_mismatch_sharded_tensors=padded,
        flatten_state_dict=False,
        flatten_sharded_tensors=False,
    )
    try:
        dcp.load(wanted, storage_reader=_Reader(directory, metadata), planner=planner, no_dist=True)
    except CheckpointException as error:
        (cause, _), *_ = error.failures.values()
        if isinstance(cause, DataError):
            raise cause from None
        raise DataError(
            f"{directory}: truncated or damaged ({cause}); copy the checkpoint again"
        ) from error
    return wanted


class _Reader(dcp.FileSystemReader):
    """Reads with the metadata that were checked, not with those that a pickle makes."""

    def __init__(self, directory: Path, metadata: Metadata) -> None:
        super().__init__(directory)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        self._metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return self._metadata


class _Planner(strategy.MCoreLoadPlanner):
    """Loads stored objects, which must be plain values."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        super().__init__(**settings)
        self._directory = directory

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.storage_index.fqn
        try:
            loaded = torch.load(value, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged or hostile record leads to
            reason = str(error).strip().splitlines()[0]
            raise DataError(
                f"{self._directory}: {name} is no plain value ({reason}); nothing of it was run, "
                "get the model from another source"
            ) from None
        if name != _COMMON and not all(_is_empty(state) for state in loaded):
            raise DataError(
                f"{self._directory}: {name} is not empty; states of FP8 layers are not supported"
            )
        self.state_dict[read_item.dest_index.fqn] = loaded


def _is_empty(state: object) -> bool:
    """True for a state that Transformer Engine does not unpickle."""
    return state is None or (isinstance(state, torch.Tensor) and state.numel() == 0)
