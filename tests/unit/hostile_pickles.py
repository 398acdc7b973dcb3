"""Pickles that run code when they are opened, in the ways that the format has for it."""

import copyreg
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from megatron_opd.weights.metadata import read_metadata


class Payload:
    """Makes the directory `mark` when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.mkdir, (self.mark,)


def call(module: str, name: str, mark: Path) -> bytes:
    """Protocol 4: STACK_GLOBAL may name an attribute of an attribute."""
    names = b"".join(
        b"X" + len(part).to_bytes(4, "little") + part.encode() for part in (module, name)
    )
    return b"\x80\x04" + names + b"\x93" + argument(mark) + b"\x85R."


def argument(mark: Path) -> bytes:
    text = str(mark).encode()
    return b"X" + len(text).to_bytes(4, "little") + text


def inside(mark: Path) -> bytes:
    """Metadata as they must be, but for a field that nobody reads."""
    return pickle.dumps(Metadata({}, planner_data={"a": [Payload(mark)]}, storage_data={}))


def later(mark: Path) -> bytes:
    """A class of the format learns, by BUILD with a state for slots, to call what is done to it
    next."""
    state = b"N}" + argument(Path("__setstate__")) + b"cos\nmkdir\ns\x86b"
    return (
        b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n"
        + state
        + argument(mark)
        + b"b."
    )


def extension(mark: Path) -> bytes:
    """A number that stands for a class, where a program has registered one."""
    if ("os", "mkdir") not in copyreg._extension_registry:  # type: ignore[attr-defined]
        copyreg.add_extension("os", "mkdir", 77)
    return b"\x80\x02\x82" + bytes([77]) + argument(mark) + b"\x85R."


PICKLES: dict[str, Callable[[Path], bytes]] = {
    "reduce": lambda mark: pickle.dumps(Payload(mark)),
    "old protocol": lambda mark: pickle.dumps(Payload(mark), protocol=0),
    "inside": inside,
    "later": later,
    "inst": lambda mark: b"(V" + str(mark).encode() + b"\nios\nmkdir\n.",
    "obj": lambda mark: b"(cos\nmkdir\nV" + str(mark).encode() + b"\no.",
    "extension": extension,
    "dotted": lambda mark: call("torch.distributed.checkpoint.metadata", "os.mkdir", mark),
    "dotted in torch": lambda mark: call("torch", "os.mkdir", mark),
    "attribute of an allowed class": lambda mark: call(
        "torch.distributed.checkpoint.metadata", "Metadata.__init__.__globals__", mark
    ),
    "function beside an allowed one": lambda mark: call("torch.serialization", "load", mark),
    "builtin": lambda mark: call("builtins", "eval", mark),
    "import": lambda mark: call("importlib", "import_module", mark),
}


def store_payload(directory: Path, key: str, mark: Path) -> None:
    """In the place of an object of a distributed checkpoint, as `torch.save` writes it."""
    metadata = read_metadata(directory)
    path = directory / "hostile.distcp"
    torch.save([Payload(mark)], path)
    metadata.state_dict_metadata[key] = BytesStorageMetadata()
    metadata.storage_data[MetadataIndex(key)] = _StorageInfo(path.name, 0, path.stat().st_size)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
