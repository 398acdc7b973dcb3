"""What there is on this machine to run a program with, and what is done without it."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from megatron_opd.errors import RunError
from megatron_opd.sandbox import bubblewrap, landlock, seccomp
from megatron_opd.sandbox.interpreter import base_python, package_paths, readable_paths

ALLOW_WEAK = "MEGATRON_OPD_ALLOW_WEAK_SANDBOX"  # a variable of the environment
PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Layers:
    """The layers of a sandbox on this machine: "" where there is one, otherwise why not.

    Limits of resources, a session and an environment of its own need nothing, and are always there.
    """

    seccomp: str
    landlock: str
    bubblewrap: str
    landlock_version: int = 0
    # how a command begins that bubblewrap runs; empty where there is none
    command: list[str] = field(default_factory=list)
    packages: tuple[str, ...] = ()  # folders of what programs may import beside the library

    def names(self) -> list[str]:
        """The layers that there are, for a record of what judged programs."""
        there = {
            "seccomp": self.seccomp,
            f"landlock-{self.landlock_version}": self.landlock,
            "bubblewrap": self.bubblewrap,
        }
        return [name for name, why_not in there.items() if not why_not]

    def refusal(self, *, allow_weak: bool = False) -> str:
        """Why no program of a model is run here; "" where one is."""
        if self.seccomp:
            return (
                f"a model's programs are not run without a filter of system calls: {self.seccomp}"
            )
        if self.landlock and self.bubblewrap and not allow_weak:
            return (
                "a model's programs are not run here, where they could read the user's files: "
                f"Landlock is {self.landlock}; {self.bubblewrap}. Install bubblewrap, "
                f"or set {ALLOW_WEAK}=1 where there is nothing to hide"
            )
        return ""


def layers(packages: Iterable[str] = ()) -> Layers:
    """Looks at the machine; takes about 0.1 s. Programs may import these installed packages.

    Raises ConfigError for a package that is not there.
    """
    python = base_python()
    folders = package_paths(packages)
    try:
        paths = readable_paths(python)
    except RunError as error:
        return Layers(str(error), landlock.why_not(), str(error), landlock.version())
    start, why = bubblewrap.working([*paths, *folders], PACKAGE, python)
    return Layers(seccomp.why_not(), landlock.why_not(), why, landlock.version(), start, folders)
