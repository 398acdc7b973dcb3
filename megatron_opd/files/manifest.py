"""`manifest.json`, which lists size and SHA-256 of every file of a directory. Imports no torch."""

import errno
import hashlib
import io
import json
import mmap
import os
import re
from collections.abc import Buffer, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

MANIFEST = "manifest.json"
_WRITE = 2**17  # bytes
_CANNOT_COPY = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class FileRecord(TypedDict):
    bytes: int
    sha256: str


def describe(path: Path) -> FileRecord:
    digest = hashlib.sha256()
    size = 0
    # a buffer of whole pages: see weights/blocks.py
    with path.open("rb", buffering=0) as file, mmap.mmap(-1, 2**17) as buffer:
        view = memoryview(buffer)
        while count := file.readinto(view):
            digest.update(view[:count])
            size += count
        view.release()
    return {"bytes": size, "sha256": digest.hexdigest()}


class NewFile(io.FileIO):
    """A new file, written in portions of 128 KiB.

    For larger writes the kernel looks for larger free areas, which takes longer than the copy.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w")

    def write(self, data: Buffer, /) -> int:
        view = memoryview(data)
        for start in range(0, len(view), _WRITE):
            super().write(view[start : start + _WRITE])
        return len(view)

    def copy(self, path: Path, offset: int, size: int) -> None:
        """Appends `size` bytes of another file, within the kernel where the file systems can.

        Raises EOFError.
        """
        with path.open("rb", buffering=0) as source:
            while size:
                try:
                    count = os.copy_file_range(source.fileno(), self.fileno(), size, offset)
                except OSError as error:
                    if error.errno not in _CANNOT_COPY:
                        raise
                    count = self.write(os.pread(source.fileno(), min(size, _WRITE), offset))
                if not count:
                    raise EOFError(path)
                offset += count
                size -= count


class CheckedFile(io.FileIO):
    """A file that is read once, in order, for its contents and its checksum alike."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._digest = hashlib.sha256()

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        count = super().readinto(buffer)
        self._digest.update(memoryview(buffer)[:count])
        return count

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Forward only: what is passed over belongs to the checksum."""
        if whence != os.SEEK_SET or offset < self.tell():
            raise io.UnsupportedOperation("a file that is read in order")
        while (left := offset - self.tell()) and self.readinto(bytearray(min(left, _WRITE))):
            pass
        return self.tell()

    def record(self) -> FileRecord:
        """The record that `describe` would return; reads the file to its end."""
        return {
            "bytes": self.seek(os.fstat(self.fileno()).st_size),
            "sha256": self._digest.hexdigest(),
        }


def write_manifest(directory: Path, known: Mapping[str, FileRecord] | None = None) -> None:
    """Lists every file below `directory`, and returns when all of them are on disk.

    `known` are the records of files that are on disk already.
    """
    manifest = dict(known or {})
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        name = str(path.relative_to(directory))
        if name not in manifest:
            manifest[name] = describe(path)
            sync(path)
    target = directory / MANIFEST
    target.write_text(json.dumps(dict(sorted(manifest.items())), indent=1))
    sync(target)
    for folder in [directory, *(p for p in directory.rglob("*") if p.is_dir())]:
        sync(folder)


def read_manifest(directory: Path) -> dict[str, FileRecord] | None:
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    if not isinstance(manifest, dict) or not all(map(_is_record, manifest.values())):
        return None
    return manifest


def _is_record(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    return {key: type(value[key]) for key in value} == {"bytes": int, "sha256": str}


def checkpoint_steps(directory: Path) -> dict[int, Path]:
    """Step -> its checkpoint below `directory`, in order of steps.

    A checkpoint without a manifest was not written to its end, and is left out; so are files and
    folders of other names.
    """
    named = [(re.fullmatch(r"step-(\d{6,})", path.name), path) for path in directory.glob("step-*")]
    return dict(
        sorted(
            (int(match[1]), path) for match, path in named if match and (path / MANIFEST).is_file()
        )
    )


def find_damage(directory: Path, *, contents: bool = True) -> str | None:
    """The first problem of the files of a directory, or None.

    Without `contents` only names and sizes are compared.
    """
    manifest = read_manifest(directory)
    if manifest is None:
        return f"{MANIFEST} is missing or unreadable"
    problems = (
        damage_of(directory, name, expected, contents=contents)
        for name, expected in manifest.items()
    )
    return next(filter(None, problems), None)


def damage_of(
    directory: Path, name: str, expected: FileRecord, *, contents: bool = True
) -> str | None:
    path = directory / name
    if not path.is_file():
        return f"{name} is missing"
    if (size := path.stat().st_size) != expected["bytes"]:
        return f"{name} has {size} bytes instead of {expected['bytes']}"
    try:
        if contents and describe(path) != expected:
            return f"{name} does not match its checksum"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return None


def sync(path: Path) -> None:
    """Returns when a file's bytes, or a directory's names, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
