"""Reads the pickle `.metadata` of a distributed checkpoint without running code that it names.

The pickle is opened with stand-ins: inert classes for the few that torch and Megatron write, and no
others. From these the metadata is built anew, after a check of the type of every value. Values that
are not needed to find tensors are dropped.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_opd.errors import DataError

METADATA = ".metadata"
_DCP = "torch.distributed.checkpoint"
_MEGATRON = "megatron.core.dist_checkpointing.strategies"
_NAMES = {
    f"{_DCP}.metadata": (
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    f"{_DCP}.filesystem": ("_StorageInfo", "_StoragePrefix"),
    f"{_DCP}.planner": (
        "SavePlan",
        "WriteItem",
        "WriteItemType",
        "TensorWriteData",
        "BytesIOWriteData",
    ),
    f"{_MEGATRON}.torch": ("MCoreMetadata", "MCoreSavePlan"),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("Path", "PosixPath"),
}


def read_metadata(directory: Path) -> Metadata:
    """The metadata of a checkpoint directory.

    Raises DataError when the file is missing or damaged, or names anything that the metadata of
    weights has no use for.
    """
    path = directory / METADATA
    try:
        with path.open("rb") as file:
            return _metadata(_Restricted(file).load())
    except OSError:
        raise DataError(f"{path}: missing; {directory} is not a distributed checkpoint") from None
    except _Refused as error:
        raise DataError(
            f"{path}: names {error}, which the metadata of weights has no use for and which may "
            "run code; nothing was run, get the model from another source"
        ) from None
    except Exception as error:  # whatever a damaged pickle leads to
        raise DataError(
            f"{path}: truncated or damaged ({error}); copy the checkpoint again"
        ) from None


class _Refused(Exception):
    """Raised with the name of a class or function that is not in `_NAMES`."""


class _Fixed(type):
    """A class whose attributes cannot be set: a pickle can try on all that it can name."""

    def __setattr__(cls, name: str, value: object) -> NoReturn:
        raise _Refused(f"{cls.__name__}.{name}")


class _StandIn(metaclass=_Fixed):
    """Keeps the state that a pickle gives an object; has no behaviour that it could call."""

    state: Any = None

    def __init__(self, *arguments: object) -> None: ...

    def __setstate__(self, state: object) -> None:
        self.state = state


_STAND_INS = {
    (module, name): _Fixed(name, (_StandIn,), {})
    for module, names in _NAMES.items()
    for name in names
}
_DTYPES = {name: dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)}


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("torch", "Size"):
            return torch.Size
        if (module, name) not in _STAND_INS:
            raise _Refused(f"{module}.{name}")
        return _STAND_INS[module, name]


# ----------------------------------------------------------------------- from stand-ins to the real
def _metadata(root: object) -> Metadata:
    fields = _fields(root, "Metadata")
    stored = _of(dict, fields["state_dict_metadata"])
    places = _of(dict, fields["storage_data"])
    tensors = {_of(str, key): _stored(value) for key, value in stored.items()}
    storage = {_index(key): _place(value) for key, value in places.items()}
    return Metadata(tensors, storage_data=storage)


def _stored(value: object) -> TensorStorageMetadata | BytesStorageMetadata:
    if _is(value, "BytesStorageMetadata"):
        return BytesStorageMetadata()
    fields = _fields(value, "TensorStorageMetadata")
    properties = fields["properties"]
    if not _is(properties, "TensorProperties"):
        raise TypeError("properties of another class")
    dtype = _of(torch.dtype, _of(tuple, properties.state)[0])
    chunks = [_chunk(chunk) for chunk in _of(list, fields["chunks"])]
    return TensorStorageMetadata(TensorProperties(dtype), _of(torch.Size, fields["size"]), chunks)


def _chunk(value: object) -> ChunkStorageMetadata:
    fields = _fields(value, "ChunkStorageMetadata")
    offsets = _of(torch.Size, fields["offsets"])
    return ChunkStorageMetadata(offsets, _of(torch.Size, fields["sizes"]))


def _index(value: object) -> MetadataIndex:
    fields = _fields(value, "MetadataIndex")
    offset = fields.get("offset")
    hint = fields.get("index")
    return MetadataIndex(
        _of(str, fields["fqn"]),
        None if offset is None else _of(torch.Size, offset),
        None if hint is None else _of(int, hint),
    )


def _place(value: object) -> _StorageInfo:
    fields = _fields(value, "_StorageInfo")
    name = _of(str, fields["relative_path"])
    offset = _of(int, fields["offset"])
    length = _of(int, fields["length"])
    if Path(name).name != name:
        raise ValueError(f"{name!r} is not the name of a file beside it")
    if offset < 0 or length < 0:
        raise ValueError(f"a record of {length} bytes at {offset}")
    if fields.get("transform_descriptors"):
        raise ValueError("compressed or otherwise transformed records")
    return _StorageInfo(name, offset, length)


def _fields(value: object, name: str) -> Mapping[str, Any]:
    if not _is(value, name):
        raise TypeError(f"{type(value).__name__} where {name} is due")
    return _of(dict, value.state)


def _is(value: object, name: str) -> TypeGuard[_StandIn]:
    return isinstance(value, _StandIn) and type(value).__name__ == name


def _of[T](kind: type[T], value: object) -> T:
    if not isinstance(value, kind):
        raise TypeError(f"{type(value).__name__} where {kind.__name__} is due")
    return value
