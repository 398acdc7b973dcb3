"""A disk that is full while a step is logged ends the run with one line, and a resumed run has
every step."""

import errno
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_opd.cluster import rank
from megatron_opd.cluster.job import Job
from megatron_opd.cluster.profile import ClusterConfig
from megatron_opd.errors import RunError
from megatron_opd.metrics.run_directory import disk_may_be_full, rollout_files
from megatron_opd.metrics.sinks import Sinks
from megatron_opd.recipe.keys import LogConfig
from megatron_opd.world.worker import outcome
from tests.unit.test_metrics import files_of, make_config, make_record, make_tokenizer

LOGS = {
    "metrics": (LogConfig(tensorboard=False, rollouts_per_step=0), 2000),
    "rollouts": (LogConfig(tensorboard=False, rollouts_per_step=3), 1000),
    "tensorboard": (LogConfig(tensorboard=True, rollouts_per_step=0), 500),
}  # what is logged, and the most bytes that a file may have

SLURM = {
    "SLURM_PROCID": "0",
    "SLURM_NTASKS": "1",
    "SLURM_LOCALID": "0",
    "SLURMD_NODENAME": "gpu1",
    "SLURM_JOB_NODELIST": "gpu1",
    "SLURM_JOB_ID": "7",
}
AGAIN = "make room and launch it again, unless Slurm starts it again itself"


@contextmanager
def file_sizes() -> Iterator[Callable[[int], None]]:
    """Limits the size of files: the same calls fail in the same places as on a full disk.

    The limit ends with the block, before pytest writes to a file of its own.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def write(
    run_dir: Path,
    log: LogConfig,
    steps: range,
    resume_step: int | None = None,
    opened: Callable[[], None] = lambda: None,
) -> None:
    with (
        disk_may_be_full(run_dir),
        Sinks(run_dir, make_config(log=log), make_tokenizer(), resume_step) as sinks,
    ):
        opened()
        for step in steps:
            sinks.log(make_record(step))
            sinks.sync()


@pytest.mark.parametrize("kind", LOGS)
def test_one_line_and_nothing_lost(kind: str, tmp_path: Path) -> None:
    (log, size), run = LOGS[kind], tmp_path / "run"
    write(tmp_path / "whole", log, range(9))
    write(run, log, range(2))  # saved here
    line = r"cannot be written \(File too large, .* free there\); what was saved is whole"
    with file_sizes() as limit, pytest.raises(RunError, match=line):
        write(run, log, range(2, 9), resume_step=2, opened=lambda: limit(size))
    write(run, log, range(2, 9), resume_step=2)
    assert files_of(run) == files_of(tmp_path / "whole")


def test_a_start_that_the_disk_refuses_is_started_again(tmp_path: Path) -> None:
    with file_sizes() as limit, pytest.raises(RunError, match=r"make room and start again$"):
        limit(100)
        write(tmp_path, LOGS["metrics"][0], range(1))
    assert not (tmp_path / "config.yaml").exists()


@pytest.mark.parametrize("limit_bytes", [20, 5])
def test_a_process_of_a_job_says_so_in_one_line(
    limit_bytes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Where the disk takes nothing, and where all is done but the verdict."""
    job = Job("tiny", str(tmp_path / "run"), str(tmp_path), "python", ClusterConfig("cpu", 1))
    job.directory.mkdir()
    job.write()
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    if limit_bytes == 5:
        monkeypatch.setattr(rank, "_take_part", lambda *_: 0)
    before = signal.getsignal(signal.SIGUSR1)
    with file_sizes() as limit:
        limit(limit_bytes)
        code = rank.main(job.directory)
    signal.signal(signal.SIGUSR1, before)
    (line,) = capsys.readouterr().err.splitlines()
    assert code == RunError.exit_code
    assert "cannot be written (File too large" in line and line.endswith(AGAIN)
    assert not (job.directory / "verdict").exists()


def test_any_command_says_so_in_one_line(tmp_path: Path) -> None:
    with file_sizes() as limit:
        limit(20)
        code, message = outcome(lambda: (tmp_path / "plan.json").write_bytes(bytes(30)))
    assert code == RunError.exit_code
    wanted = (
        "nothing more can be written (File too large); make room and run the same command again"
    )
    assert message == wanted


def test_other_errors_keep_their_traceback(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="name") as caught, disk_may_be_full(tmp_path):
        raise OSError(errno.ENOENT, "name")
    assert not isinstance(caught.value, RunError)


def test_other_names_among_the_samples_are_let_be(tmp_path: Path) -> None:
    (tmp_path / "rollouts").mkdir()
    for name in (
        "step-000003.jsonl",
        "step-abc.jsonl",
        "step-000002 (copy).jsonl",
        "step-000001.jsonl",
        ".DS_Store",
    ):
        (tmp_path / "rollouts" / name).touch()
    assert list(rollout_files(tmp_path)) == [1, 3]
