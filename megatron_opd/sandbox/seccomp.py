"""The filter of system calls: a classic BPF program, made and installed without a library."""

import ctypes
import errno
import os
import platform
import struct

from megatron_opd.sandbox import system_calls as calls
from megatron_opd.sandbox.system_calls import Numbers, number

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32 = 0x40000000  # a second set of calls on x86_64
_CLONE_THREAD = 0x10000

# of linux/bpf_common.h: the load of a word, the mask, the jumps, the end
_LOAD = 0x20
_AND = 0x54
_EQUAL = 0x15
_GREATER = 0x25
_AT_LEAST = 0x35
_ANY_BIT = 0x45
_RETURN = 0x06
# of linux/seccomp.h: the fields of seccomp_data, and the answers
_NUMBER = 0
_ARCH = 4
_ALLOW = 0x7FFF0000
_REFUSE = 0x00050000 | errno.EPERM
_UNKNOWN = 0x00050000 | errno.ENOSYS
_KILL_PROCESS = 0x80000000

_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_SECCOMP = 22
_SECCOMP_MODE_FILTER = 2

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, operand
# of a rule that looks at arguments: it jumps to one of the two
_END: list[Instruction] = [(_RETURN, 0, 0, _REFUSE), (_RETURN, 0, 0, _ALLOW)]


def why_not() -> str:
    """Why no filter can be installed on this machine; "" where one can, as far as can be told."""
    machine = platform.machine()
    if machine not in calls.MACHINES:
        return f"no table of system calls for {machine}, only for {' and '.join(calls.MACHINES)}"
    # EFAULT: the kernel knows the mode and wants a program.
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, None, 0, 0)
    code = ctypes.get_errno()
    return "" if code == errno.EFAULT else f"the kernel has no filters: {os.strerror(code)}"


def install(pid: int) -> None:
    """Filters the calls of this process from now on, and of what it executes. Raises OSError.

    `pid` is its own, as it sees it: the only one that it may send signals to.
    """
    program = filter_of(platform.machine(), pid)
    packed = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(packed, len(packed))
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    steps = (
        (_PR_SET_NO_NEW_PRIVS, 1, 0),
        (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.c_char_p(header)),
    )
    for option, first, second in steps:
        if libc.prctl(option, first, second, 0, 0):
            code = ctypes.get_errno()
            raise OSError(code, f"seccomp: {os.strerror(code)}")


def filter_of(machine: str, pid: int) -> list[Instruction]:
    """The program for a machine of MACHINES."""
    program: list[Instruction] = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, _AUDIT_ARCH[machine]),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_GREATER, 0, 1, calls.NEWEST),
        (_RETURN, 0, 0, _UNKNOWN),
    ]
    for table, answer in ((calls.UNKNOWN, _UNKNOWN), (calls.DENIED, _REFUSE)):
        for numbers in table.values():
            program += _rule(machine, numbers, [(_RETURN, 0, 0, answer)])
    thread = [(_LOAD, 0, 0, _low(0)), (_ANY_BIT, 1, 0, _CLONE_THREAD)]
    program += _rule(machine, calls.CLONE, [*thread, *_END])
    own = [(_LOAD, 0, 0, _low(0)), (_EQUAL, 1, 0, pid)]
    for numbers in (calls.KILL, calls.TGKILL):
        program += _rule(machine, numbers, [*own, *_END])
    # a file's owner gets signals that no call sends: F_SETOWN, F_SETOWN_EX, F_SETSIG
    owner = [(_LOAD, 0, 0, _low(1)), (_EQUAL, 2, 0, 8), (_EQUAL, 1, 0, 15), (_EQUAL, 0, 1, 10)]
    program += _rule(machine, calls.FCNTL, [*owner, *_END])
    # limits may be read: the pointer to new ones is null, in both of its halves
    no_limit = [
        (_LOAD, 0, 0, _low(2)),
        (_EQUAL, 0, 2, 0),
        (_LOAD, 0, 0, _high(2)),
        (_EQUAL, 1, 0, 0),
    ]
    program += _rule(machine, calls.PRLIMIT64, [*no_limit, *_END])
    # Landlock's first versions let a file that may only be read be cut while it is opened, and
    # none asks for a right where the mode of access is the fourth, for ioctl alone
    for numbers, argument in ((calls.OPEN, 1), (calls.OPENAT, 2)):
        cut = [
            (_LOAD, 0, 0, _low(argument)),
            (_AND, 0, 0, os.O_ACCMODE | os.O_TRUNC),
            (_EQUAL, 2, 0, os.O_RDONLY | os.O_TRUNC),
            (_EQUAL, 1, 0, os.O_ACCMODE),
            (_EQUAL, 0, 1, os.O_ACCMODE | os.O_TRUNC),
        ]
        program += _rule(machine, numbers, [*cut, *_END])
    return [*program, (_RETURN, 0, 0, _ALLOW)]


def _rule(machine: str, numbers: Numbers, body: list[Instruction]) -> list[Instruction]:
    """What is done about one call; `body` ends in a return on every way."""
    call = number(numbers, machine)
    return [] if call is None else [(_EQUAL, 0, len(body), call), *body]


def _low(argument: int) -> int:
    """The offset of an argument's low half, on a little-endian machine."""
    return 16 + 8 * argument


def _high(argument: int) -> int:
    return _low(argument) + 4
