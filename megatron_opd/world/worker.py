"""The start of every process of ours, and its end: an exit code, and one line for the user."""

import errno
import logging
import os
import sys
import warnings
from collections.abc import Callable

from megatron_opd.errors import ConfigError, DataError, Interrupted, OpdError, RunError
from megatron_opd.world import torchrun
from megatron_opd.world.host import hide_gpus

# Errors of a path that its user can mend; other errors of the system are not expected.
_WRONG_PATHS = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
)
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def prepare_process() -> None:
    """Prepares a process of our own or a user's before torch is imported."""
    quieten_dependencies()
    hide_gpus()


def quieten_dependencies() -> None:
    """Silences the warnings of packages about one another; `doctor` reports missing packages."""
    warnings.filterwarnings("ignore", category=SyntaxWarning)
    for package in ("megatron", "torch"):
        warnings.filterwarnings("ignore", module=rf"{package}\b")
    # vLLM looks at every name of torch, old ones too
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\.reduce_op")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # that there is no CUDA
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def outcome(work: Callable[[], int | None]) -> tuple[int, str]:
    """The exit code of `work`, and a line for the user.

    The codes are 0, 1 (failed), 2 (bad input) and 130 (interrupted).
    """
    try:
        return work() or 0, ""
    except OpdError as error:
        return error.exit_code, " ".join(str(error).split())
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0, ""
    except OSError as error:
        if error.errno in _FULL_DISK:
            where = f"{error.filename}: " if error.filename else ""
            reason = f"nothing more can be written ({error.strerror})"
            return RunError.exit_code, f"{where}{reason}; make room and run the same command again"
        if error.errno not in _WRONG_PATHS or error.filename is None:
            raise
        return ConfigError.exit_code, f"{error.filename}: {error.strerror}; name another path"
    except KeyboardInterrupt:
        return Interrupted.exit_code, "interrupted"


def finish(code: int, message: str) -> int:
    """Prints the line once for all processes of a run. Returns the code to exit with."""
    if torchrun.is_worker():
        return torchrun.record_outcome(code, message)  # the starting process prints it
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0 or code == OpdError.exit_code:  # bad input and a stop are the same on every rank
        say(code, f"rank {rank}: {message}" if rank else message)
    return code


def say(code: int, message: str) -> None:
    """Prints the user's line, if there is one."""
    if code and message:
        kind = "" if code == Interrupted.exit_code else "error: "
        print(f"megatron-opd: {kind}{message}", file=sys.stderr, flush=True)


def raise_outcome(code: int, message: str) -> None:
    """Raises the exception that ended processes started elsewhere; none for code 0."""
    if code == Interrupted.exit_code:
        raise KeyboardInterrupt
    if code:
        kind: type[OpdError] = DataError if code == DataError.exit_code else RunError
        raise kind(message)
