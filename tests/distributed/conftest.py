"""Starts the programs of the distributed tests, on gloo."""

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests import forked


@pytest.fixture(scope="session")
def run_distributed() -> Callable[..., CompletedProcess[str]]:
    """The launcher: `run_distributed(program, nproc, *args, timeout=240)`; any test or fixture can
    take it."""
    return _run_distributed


def _run_distributed(
    program: str | Path, nproc: int, *args: object, **settings: object
) -> CompletedProcess[str]:
    """`tests.forked.run`; fails the test with the programs' output where one of them does."""
    done = forked.run(program, nproc, *args, **settings)
    if done.returncode:
        tail = "\n".join([*done.stdout.splitlines()[-40:], *done.stderr.splitlines()[-250:]])
        pytest.fail(
            f"{program} on {nproc} processes ended with {done.returncode}:\n{tail}", pytrace=False
        )
    return done
