"""What every test shares: one thread per process, no network, and the rule for tests that need a
GPU."""

import contextlib
import fcntl
import json
import os
import sys
import time

# Read by torch, tokenizers and matplotlib when they are imported, so set before any test module is.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from collections.abc import Callable, Generator, Mapping
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-golden", action="store_true", help="keep today's figures in tests/golden/"
    )


@pytest.fixture(scope="session")
def check_golden(
    pytestconfig: pytest.Config,
) -> Callable[[str, Mapping[str, Mapping[str, float]]], None]:
    """Compares figures (case -> name -> value) with the ones kept in tests/golden/NAME.json.

    Another processor rounds otherwise, so a relative difference of 1e-4 is allowed. A change of
    more, or a case that comes or goes, is meant or a fault: if it is meant, run the test with
    --write-golden and commit the file.
    """

    def check(name: str, figures: Mapping[str, Mapping[str, float]]) -> None:
        path = GOLDEN / f"{name}.json"
        if pytestconfig.getoption("--write-golden"):
            path.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n")
        golden = json.loads(path.read_text())
        assert figures.keys() == golden.keys()
        for case, values in figures.items():
            assert values == pytest.approx(golden[case], rel=1e-4, abs=1e-6), case

    return check


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Writes a module of the user's into a folder that becomes the working directory.

    (name, code) -> the folder. Nothing of it is left in the process after the test.
    """

    def write(name: str, code: str) -> Path:
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.path", [*sys.path])
        monkeypatch.delitem(sys.modules, name, raising=False)
        return tmp_path

    return write


@pytest.fixture(scope="session")
def agents_python() -> str:
    """The Python of .venv-agents, which `make test` makes beside the tests: the first time it
    compiles for minutes."""
    root = Path(__file__).parents[1]
    setup = os.environ.get("AGENTS_SETUP")  # its process
    if setup:
        import psutil

        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(int(setup))
            while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                time.sleep(1.0)
    if not (root / ".venv-agents" / ".setup-stamp").is_file():
        log = root / ".venv-agents.log"
        lines = log.read_text().splitlines() if setup and log.is_file() else []
        pytest.skip(f"no .venv-agents: {lines[-1] if lines else '`make agents-env` makes it'}")
    return str(root / ".venv-agents" / "bin" / "python")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not Path("/var/lib/megatron-opd-slurm/slurmctld.pid").exists():
        for item in items:
            if item.get_closest_marker("slurm"):
                item.add_marker(
                    pytest.mark.skip(reason="needs a Slurm; `make test-slurm` starts one")
                )
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_tests:
        return
    import torch  # takes seconds, so only when a test asks

    if not torch.cuda.is_available():
        for item in gpu_tests:
            item.add_marker(
                pytest.mark.skip(reason="needs a CUDA device, and this machine has none")
            )


# ------------------------------------------------------------------------- tests in two processes
@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Runs a test marked `alone` or `gpu` while no other process of this test run has one.

    Whoever waits holds the gate, so that the others begin nothing more.
    """
    if not hasattr(item.config, "workerinput"):  # pytest-xdist's, in its processes
        return (yield)
    assert item.config.cache is not None
    folder = item.config.cache.mkdir("turns")
    with (folder / "gate").open("w") as gate, (folder / "machine").open("w") as machine:
        alone = any(item.get_closest_marker(name) for name in ("alone", "gpu"))
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(machine, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        try:
            return (yield)
        finally:
            fcntl.flock(machine, fcntl.LOCK_UN)  # also of copies that forked processes hold


# -------------------------------------------------------------------------------- the parity matrix
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints what tests/distributed/test_parity_matrix.py measured."""
    reports = [
        report
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
    ]
    rows = [
        value for report in reports for name, value in report.user_properties if name == "parity"
    ]
    if not rows:
        return
    terminalreporter.section("parity with one process after three TGPO steps, relative errors")
    width = max(len(name) for _, name, _ in rows)
    terminalreporter.line(f"{'':5}  {'layout':{width}}  {'loss':>8}  {'norm':>8}  parameters")
    for kind, name, errors in rows:
        numbers = f"{errors['loss']:8.0e}  {errors['norm']:8.0e}  {errors['parameters']:8.0e}"
        terminalreporter.line(f"{kind:5}  {name:{width}}  {numbers}")
