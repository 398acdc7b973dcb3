"""Messages between a sandbox and its server: a header in JSON, then blocks of bytes."""

import json
import os
import struct
from collections.abc import Callable
from typing import Any

Header = dict[str, Any]
_CHUNK_BYTES = 2**20


class Ended(Exception):
    """The other side has gone."""


def send(descriptor: int, header: Header, *blocks: bytes) -> None:
    """Raises Ended."""
    line = json.dumps(header | {"sizes": [len(block) for block in blocks]}).encode()
    rest = memoryview(b"".join((struct.pack(">I", len(line)), line, *blocks)))
    try:
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    except OSError as error:
        raise Ended(str(error)) from None


def receive(descriptor: int, wait: Callable[[], None] = lambda: None) -> tuple[Header, list[bytes]]:
    """The next message; `wait` is called before every read, and may raise. Raises Ended."""
    (size,) = struct.unpack(">I", _exactly(descriptor, 4, wait))
    header = json.loads(_exactly(descriptor, size, wait))
    return header, [_exactly(descriptor, size, wait) for size in header["sizes"]]


def _exactly(descriptor: int, size: int, wait: Callable[[], None]) -> bytes:
    parts = []
    while size:
        wait()
        try:
            part = os.read(descriptor, min(size, _CHUNK_BYTES))
        except OSError as error:
            raise Ended(str(error)) from None
        if not part:
            raise Ended("the other side has gone")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
