"""Landlock: which files a process may reach, as the kernel enforces it since version 5.13."""

import ctypes
import errno
import os
import stat
import struct
from collections.abc import Iterable

# the same numbers on x86_64 and aarch64
_CREATE_RULESET = 444
_ADD_RULE = 445
_RESTRICT_SELF = 446
_VERSION = 1
_PATH_BENEATH = 1
_PR_SET_NO_NEW_PRIVS = 38

_EXECUTE = 1 << 0
_WRITE_FILE = 1 << 1
_READ_FILE = 1 << 2
_READ_DIR = 1 << 3
_TRUNCATE = 1 << 14
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE
READ = _EXECUTE | _READ_FILE | _READ_DIR
# and make and remove files and folders, but neither devices nor sockets
WRITE = READ | _WRITE_FILE | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 12 | 1 << 13 | _TRUNCATE
DEVICE = _READ_FILE | _WRITE_FILE

# All rights over files that a version knows, and so takes away where no rule gives them.
_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1}
_RIGHTS_LATER = (1 << 16) - 1
_TCP = 0b11  # bind and connect, from version 4
_SCOPES = 0b11  # abstract sockets and signals, from version 6


def version() -> int:
    """The kernel's version of Landlock; 0 where it has none."""
    libc = ctypes.CDLL(None, use_errno=True)
    return max(int(libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION)), 0)


def why_not() -> str:
    """Why there is no Landlock; "" where there is."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION) > 0:
        return ""
    code = ctypes.get_errno()
    if code == errno.EOPNOTSUPP:
        return "not among the kernel's security modules (boot option lsm=)"
    if code == errno.EPERM:
        return "refused here, by a container's filter"
    return f"not in this kernel, which needs 5.13: {os.strerror(code)}"


def restrict(allowed: Iterable[tuple[str, int]]) -> None:
    """Leaves this process these paths with these rights (READ, WRITE, DEVICE), and no others.

    Paths that do not exist are passed over. Raises OSError.
    """
    number = version()
    known = _RIGHTS.get(number, _RIGHTS_LATER)
    fields = [known, _TCP if number >= 4 else 0, _SCOPES if number >= 6 else 0]
    size = 8 if number < 4 else 16 if number < 6 else 24
    attributes = struct.pack("QQQ", *fields)[:size]
    libc = ctypes.CDLL(None, use_errno=True)
    ruleset = _checked(libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(size), 0))
    try:
        for path, rights in allowed:
            _allow(libc, ruleset, path, rights & known)
        _checked(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        _checked(libc.syscall(_RESTRICT_SELF, ruleset, 0))
    finally:
        os.close(ruleset)


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, rights: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            rights &= _OF_FILES
        rule = struct.pack("=Qi", rights, descriptor)
        _checked(libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0))
    finally:
        os.close(descriptor)


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"Landlock: {os.strerror(code)}")
    return result
