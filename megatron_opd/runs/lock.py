"""One process at a time works in a run directory: rank 0 of the run, which holds a lock on a file
in it.

The lock is POSIX's (`fcntl.lockf`). The kernel takes it back however the process ends, and no
process that it starts inherits it. Between nodes it is as good as the file system's locks: NFS 4
passes them to the server, NFS 3 too with its lock daemon (not where it is mounted with nolock or
local_lock), Lustre where it is mounted with flock. A node that is lost keeps its locks until the
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

from megatron_opd.checks.recipe import RUN_LOCK
from megatron_opd.errors import ConfigError

SECONDS = 120.0 if "SLURM_JOB_ID" in os.environ else 3.0
_TAKEN = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def held(directory: Path, seconds: float = SECONDS) -> Iterator[None]:
    """Makes the directory and holds its lock. What is empty but for the lock is removed again at
    the end.

    Raises ConfigError, after waiting for `seconds`, where another process has it. Where the file
    system has no locks it says so and goes on.
    """
    path, deadline = directory / RUN_LOCK, time.monotonic() + seconds
    while (descriptor := _take(path)) is None:
        if time.monotonic() > deadline:
            raise ConfigError(
                f"run_dir: {directory} is in use by {_holder(path)}; wait for its end or stop it, "
                "or give run_dir=..."
            )
        time.sleep(0.1)
    try:
        with contextlib.suppress(OSError):  # a full disk; only the message of others is poorer
            os.ftruncate(descriptor, 0)
            os.write(
                descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode()
            )
        yield
    finally:
        with contextlib.suppress(OSError):
            if [each.name for each in directory.iterdir()] == [RUN_LOCK]:
                path.unlink()
                directory.rmdir()
        os.close(descriptor)


def _take(path: Path) -> int | None:
    """The locked file, or None while another process has it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise ConfigError(
            f"run_dir: cannot write {path} ({error.strerror}); choose another run_dir=..."
        ) from None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            print(
                f"megatron-opd: warning: {path}: no locks there ({error.strerror})",
                file=sys.stderr,
                flush=True,
            )
            return descriptor
        os.close(descriptor)
        if error.errno in _TAKEN:
            return None
        raise
    if path.is_file() and os.path.samestat(os.fstat(descriptor), path.stat()):
        return descriptor
    os.close(descriptor)  # its holder has removed it meanwhile
    return _take(path)


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, LookupError, TypeError):
        return "another process"
