"""What every process of ours does first, and how it ends: an exit code, and one line for the
user."""

import errno
import logging
import os
import sys
import warnings
from collections.abc import Callable

from megatron_opd.errors import ConfigError, DataError, Interrupted, OpdError, RunError
from megatron_opd.world import torchrun
from megatron_opd.world.host import hide_gpus

# Whoever named the path can do something about it; nothing else that the system refuses is
# expected.
_WRONG_PATHS = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
)


def prepare_process() -> None:
    """What comes before torch is imported, in a process of our own or a user's."""
    quieten_dependencies()
    hide_gpus()


def quieten_dependencies() -> None:
    """Leaves out what packages say about each other; `doctor` says what is missing and what that
    costs."""
    warnings.filterwarnings("ignore", category=SyntaxWarning)
    for package in ("megatron", "torch"):
        warnings.filterwarnings("ignore", module=rf"{package}\b")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # that there is no CUDA
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def outcome(work: Callable[[], int | None]) -> tuple[int, str]:
    """The exit code of `work` and the user's line: 0, 1 (failed), 2 (bad input) or 130
    (interrupted)."""
    try:
        return work() or 0, ""
    except OpdError as error:
        return error.exit_code, " ".join(str(error).split())
    except BrokenPipeError:  # the reader of the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0, ""
    except OSError as error:
        if error.errno not in _WRONG_PATHS or error.filename is None:
            raise
        return ConfigError.exit_code, f"{error.filename}: {error.strerror}; name another path"
    except KeyboardInterrupt:
        return Interrupted.exit_code, "interrupted"


def finish(code: int, message: str) -> int:
    """Says the line once for all processes of a run. Returns the code to exit with."""
    if torchrun.is_worker():
        return torchrun.record_outcome(code, message)  # the starting process says it
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0 or code == OpdError.exit_code:  # bad input and a stop are the same on every rank
        say(code, f"rank {rank}: {message}" if rank else message)
    return code


def say(code: int, message: str) -> None:
    """One line for the user, where there is something to say."""
    if code and message:
        kind = "" if code == Interrupted.exit_code else "error: "
        print(f"megatron-opd: {kind}{message}", file=sys.stderr, flush=True)


def raise_outcome(code: int, message: str) -> None:
    """What processes that were started elsewhere ended with, as the exception it was there; nothing
    where it is 0."""
    if code == Interrupted.exit_code:
        raise KeyboardInterrupt
    if code:
        kind: type[OpdError] = DataError if code == DataError.exit_code else RunError
        raise kind(message)
