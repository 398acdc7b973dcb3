"""bubblewrap: namespaces of its own for the server of a sandbox, where users may make them."""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

SCRATCH = "/scratch"
PACKAGE = "/package"
SCRATCH_BYTES = 64 * 2**20
TRIAL_SECONDS = 20


def command(paths: Sequence[str], package: Path, *, proc: bool) -> list[str]:
    """The beginning of a command that bubblewrap runs with nothing but `paths`, to be read.

    No network, no other process, no user's files; the package's folder is in PACKAGE, and what is
    in SCRATCH can be written, up to SCRATCH_BYTES, and nothing in /dev/shm. Without `proc` there is
    no /proc, which some containers do not allow to mount. The command is process 1 of its
    namespace, so that everything in it ends with it.
    """
    bound = [part for path in paths for part in ("--ro-bind-try", path, path)]
    return [
        *("bwrap", "--unshare-all", "--as-pid-1", "--cap-drop", "ALL", *bound, "--dev", "/dev"),
        *(("--proc", "/proc") if proc else ()),
        *("--ro-bind", str(package), f"{PACKAGE}/{package.name}"),
        *("--size", str(SCRATCH_BYTES), "--tmpfs", SCRATCH),
        *("--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/", "--"),
    ]


def working(paths: Sequence[str], package: Path, python: str) -> tuple[list[str], str]:
    """The beginning of a command that works here; or none, and why not."""
    binary = shutil.which("bwrap")
    if binary is None:
        return [], "bwrap is not on PATH; the system's package is called bubblewrap"
    why = ""
    for proc in (True, False):
        start = [binary, *command(paths, package, proc=proc)[1:]]
        try:
            trial = subprocess.run(
                [*start, python, "-S", "-c", "pass"],
                env={},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=TRIAL_SECONDS,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return [], f"bwrap does not start: {error}"
        if trial.returncode == 0:
            return start, ""
        lines = trial.stderr.decode(errors="replace").strip().splitlines()
        why = why or f"bwrap: {lines[-1] if lines else f'exit code {trial.returncode}'}"
    return [], why
