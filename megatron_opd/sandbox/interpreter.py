"""The interpreter that runs a program, and the files that it cannot do without."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterable

from megatron_opd.errors import ConfigError, RunError

# No site-packages, no folder of the caller's, nothing written beside modules; the environment is
# made anew for it. A fixed hash seed fixes the order of sets: equal programs, equal outcomes.
OPTIONS = ("-P", "-s", "-S", "-B", "-X", "utf8")
ENVIRONMENT = {"PYTHONHASHSEED": "0"}
# A program has one core, and threads of a library would only fill its address space.
WITH_PACKAGES = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
START_SECONDS = 60

# Where the dynamic loader and the C library are, and a clock's time zones.
_SYSTEM = (
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/etc/ld.so.cache",
    "/usr/share/zoneinfo",
)
# Run by the interpreter itself: its standard library, and the folders of what modules in C load.
_LOOK = """
import json, os, sys, sysconfig
for name in ("ctypes", "ssl", "hashlib", "decimal", "zlib", "bz2", "lzma", "sqlite3", "uuid"):
    try:
        __import__(name)
    except ImportError:
        pass
paths = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib")]
paths.append(os.path.realpath(sys.executable))
with open("/proc/self/maps") as maps:
    files = {line.split(None, 5)[5].strip() for line in maps if len(line.split(None, 5)) > 5}
paths += [os.path.dirname(path) for path in files if ".so" in os.path.basename(path)]
print(json.dumps(paths))
"""


def base_python() -> str:
    """This process's interpreter, without its virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


@functools.cache
def readable_paths(python: str) -> tuple[str, ...]:
    """The files and folders that `python` reads to run a program of the standard library.

    Raises RunError where it does not start.
    """
    try:
        looked = subprocess.run(
            [python, *OPTIONS, "-c", _LOOK],
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=START_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RunError(f"sandbox: the interpreter {python} does not start: {error}") from None
    if looked.returncode:
        lines = looked.stderr.decode(errors="replace").strip().splitlines()
        why = lines[-1] if lines else f"exit code {looked.returncode}"
        raise RunError(f"sandbox: the interpreter {python} does not start: {why}")
    paths = [*_SYSTEM, *sorted(json.loads(looked.stdout))]
    return tuple(path for path in _outermost(paths) if os.path.exists(path))


def package_paths(names: Iterable[str]) -> tuple[str, ...]:
    """The folders of installed packages, and of the libraries that their wheels brought along.

    Raises ConfigError for one that is not there.
    """
    paths = []
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError(f"a package for programs, {name}, is not installed here")
        folder = os.path.realpath(spec.submodule_search_locations[0])
        paths += [path for path in (folder, f"{folder}.libs") if os.path.isdir(path)]
    return tuple(paths)


def _outermost(paths: list[str]) -> list[str]:
    """The paths, every one once, without those beneath another one."""
    kept: list[str] = []
    for path in paths:
        if not any(path == other or path.startswith(other + "/") for other in kept):
            kept.append(path)
    return kept
