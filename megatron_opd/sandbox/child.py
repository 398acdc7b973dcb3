"""Between fork and exec: everything that a program's process takes upon itself."""

import ctypes
import math
import os
import resource
import signal
import struct
from collections.abc import Sequence
from typing import NoReturn

from megatron_opd.sandbox import landlock, seccomp
from megatron_opd.sandbox.interpreter import ENVIRONMENT, OPTIONS, WITH_PACKAGES
from megatron_opd.sandbox.limits import HANDED_BACK, Limits

_PR_SET_PDEATHSIG = 1
_CAPABILITY_VERSION = 0x20080522
# To read files whatever their mode: root's interpreter may be another user's. Landlock is above it.
_CAP_DAC_READ_SEARCH = 1 << 2
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


def become(
    limits: Limits,
    *,
    python: str,
    program: str,
    folder: str,
    pipes: Sequence[int],
    trouble: int,
    readable: Sequence[str],
    packages: str,
    files_guarded: bool,
) -> NoReturn:
    """Runs `program` in this process, which has been forked for it.

    `pipes` become its descriptors from 0 on. What cannot be done goes as a line to the descriptor
    `trouble`, and the program does not begin.
    """
    try:
        os.setsid()
        parent = os.getppid()
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)
        _take_descriptors(pipes, trouble)
        os.umask(0o077)
        os.chdir(folder)
        _limit(limits)
        _drop_capabilities(libc)
        if files_guarded:
            rights = landlock.WRITE if limits.files else landlock.READ
            landlock.restrict(
                [
                    *((path, landlock.READ) for path in readable),
                    *((path, landlock.DEVICE) for path in _DEVICES),
                    (program, landlock.READ),
                    (folder, rights),
                ]
            )
        seccomp.install(os.getpid())
        found = WITH_PACKAGES | {"PYTHONPATH": packages} if packages else {}
        os.execve(python, [python, *OPTIONS, program], ENVIRONMENT | found)
    except BaseException as error:
        os.write(HANDED_BACK + 1, f"{type(error).__name__}: {error}".encode())
    finally:
        os._exit(1)


def _take_descriptors(pipes: Sequence[int], trouble: int) -> None:
    """Leaves the pipes as 0 to HANDED_BACK, and `trouble` behind them until the exec."""
    # first out of the way of each other
    high = [os.dup2(descriptor, 64 + place) for place, descriptor in enumerate((*pipes, trouble))]
    for place, descriptor in enumerate(high):
        os.dup2(descriptor, place, inheritable=place <= HANDED_BACK)
    os.closerange(len(high), os.sysconf("SC_OPEN_MAX"))


def _limit(limits: Limits) -> None:
    amounts = {
        resource.RLIMIT_AS: limits.memory_bytes,
        # the server is more exact; this one ends a program whose server is lost, too
        resource.RLIMIT_CPU: math.ceil(limits.cpu_seconds) + 1,
        resource.RLIMIT_FSIZE: limits.file_bytes if limits.files else 0,
        resource.RLIMIT_NOFILE: limits.open_files,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_STACK: limits.stack_bytes,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for kind, amount in amounts.items():
        hard = resource.getrlimit(kind)[1]
        most = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
        resource.setrlimit(kind, (most, most))


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    """Gives up root's rights, but for that to read files. They do not come back with an exec,
    because of no_new_privs."""
    header = struct.pack("Ii", _CAPABILITY_VERSION, 0)
    sets = ctypes.create_string_buffer(24)  # effective, permitted, inheritable, low and then high
    if libc.capget(header, sets):
        raise OSError(ctypes.get_errno(), "capget")
    permitted = struct.unpack("6I", sets.raw)[1] & _CAP_DAC_READ_SEARCH
    if libc.capset(header, struct.pack("6I", permitted, permitted, 0, 0, 0, 0)):
        raise OSError(ctypes.get_errno(), "capset")
