"""The lock of the directory of a run or an evaluation. Rank 0 holds it, so that one at a time works
there.

The lock is POSIX's (`fcntl.lockf`). The kernel takes it back at any end of the process, and no
process that it starts inherits it. Between nodes it is as good as the file system's locks: NFS 4
passes them to the server, NFS 3 too with its lock daemon (unless it is mounted with nolock or
local_lock), Lustre if it is mounted with flock. A node that is lost keeps its locks until the
server's lease ends, 90 s on Linux, so a job of Slurm waits longer than that.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_opd.errors import ConfigError

RUN_LOCK = ".lock"
SECONDS = 120.0 if "SLURM_JOB_ID" in os.environ else 3.0
_TAKEN = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def locked(
    directory: Path, seconds: float = SECONDS, *, named: str = "run_dir: ", option: str = "run_dir="
) -> Iterator[None]:
    """Makes the directory and holds its lock; removes the directory at the end if it is empty.

    Raises ConfigError when another process has the lock for longer than `seconds`; its line begins
    with `named`, and `option` is how another directory is given. Warns and goes on if the file
    system has no locks.
    """
    path = directory / RUN_LOCK
    deadline = time.monotonic() + seconds
    while (descriptor := _take(path, named, option)) is None:
        if time.monotonic() > deadline:
            raise ConfigError(
                f"{named}{directory} is in use by {_holder(path)}; wait for its end or stop it, "
                f"or give {option}..."
            )
        time.sleep(0.1)
    try:
        with contextlib.suppress(OSError):  # with a full disk, others cannot name this process
            holder = {"pid": os.getpid(), "host": socket.gethostname()}
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps(holder).encode())
        yield
    finally:
        with contextlib.suppress(OSError):
            if [entry.name for entry in directory.iterdir()] == [RUN_LOCK]:
                path.unlink()
                directory.rmdir()
        os.close(descriptor)


def in_use(directory: Path) -> bool | None:
    """True while another process has the directory's lock; None where that cannot be told.

    Never for the process that has the lock, which would lose it when the file is closed here.
    """
    try:
        descriptor = os.open(directory / RUN_LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return True if error.errno in _TAKEN else None
    finally:
        os.close(descriptor)
    return False


def _take(path: Path, named: str, option: str) -> int | None:
    """The descriptor of the locked file, or None while another process has the lock."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise ConfigError(
            f"{named}cannot write {path} ({error.strerror}); choose another {option}..."
        ) from None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            line = f"megatron-opd: warning: {path}: no locks there ({error.strerror})"
            print(line, file=sys.stderr, flush=True)
            return descriptor
        os.close(descriptor)
        if error.errno in _TAKEN:
            return None
        raise
    if path.is_file() and os.path.samestat(os.fstat(descriptor), path.stat()):
        return descriptor
    os.close(descriptor)  # its holder has removed it meanwhile
    return _take(path, named, option)


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, LookupError, TypeError):
        return "another process"
