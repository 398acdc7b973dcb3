"""A job's directory RUN.job, beside the run's: the files its processes read and write.

recipe.yaml     the resolved recipe
job.json        this file's `Job`
job_id          Slurm's number of the newest job; a line each
excluded        nodes that a job must not get; a line each
cancelled       there once `cancel` was asked for: nothing starts the run again
verdict         what the processes say of their end, read by the batch script (see script.py)
heartbeat.json  written every few seconds by rank 0; the last one holds the final state
logs/           of the batch script and of the processes, per job and restart
attempts/JOB-RESTART/  the nodes' reports, their all-reduces, the rendezvous
"""

import json
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_opd.cluster.profile import ClusterConfig
from megatron_opd.errors import ConfigError
from megatron_opd.files.atomic import write_atomically
from megatron_opd.files.typed import build
from megatron_opd.recipe.keys import RunConfig


@dataclass(frozen=True)
class Job:
    """One run on a cluster, however many Slurm jobs and restarts it takes."""

    name: str
    run_dir: str  # absolute
    working_dir: str  # in which the recipe's relative paths hold
    python: str  # on the nodes
    cluster: ClusterConfig

    @property
    def directory(self) -> Path:
        return directory_of(Path(self.run_dir))

    @property
    def processes(self) -> int:
        return self.cluster.nodes * self.cluster.processes_per_node

    def command(self) -> list[str]:
        """The command that every process of the job runs."""
        return [self.python, "-m", "megatron_opd.cluster.rank", str(self.directory)]

    def environment(self) -> dict[str, str]:
        """The environment variables of the job's processes, quoted for a shell."""
        threads = str(self.cluster.cpus_per_process or 1)
        # Newer versions of srun do not take the number of CPUs from sbatch.
        settings = {
            "OMP_NUM_THREADS": threads,
            "SRUN_CPUS_PER_TASK": threads,
            "PYTHONUNBUFFERED": "1",
        }
        settings |= self.cluster.environment
        return {key: shlex.quote(value) for key, value in settings.items()}

    def write(self) -> None:
        text = json.dumps(asdict(self), indent=1)
        write_atomically(self.directory / "job.json", f"{text}\n".encode())


def directory_of(run_dir: Path) -> Path:
    return run_dir.with_name(run_dir.name + ".job")


def make(config: RunConfig, cluster: ClusterConfig, python: str) -> Job:
    """The job of a recipe. Raises ConfigError where a path could not stand in a batch script.

    `python`: this interpreter; at the other end of a tunnel it is that of the checkout there.
    """
    home = Path.cwd()
    if cluster.tunnel:
        home = Path(cluster.tunnel.directory)
        python = str(home / ".venv" / "bin" / "python")
    run_dir = home / config.directory
    for key, path in (
        ("run_dir", run_dir),
        ("python", Path(python)),
        ("the working directory", home),
    ):
        if any(character.isspace() for character in str(path)):
            raise ConfigError(
                f"{key}: {path} has a space, which batch scripts cannot have in paths; choose "
                "another"
            )
    if cluster.container:
        python = cluster.container.python
    return Job(config.name, str(run_dir), str(home), cluster.python or python, cluster)


def read(directory: Path) -> Job:
    """The job in RUN.job. Raises ConfigError."""
    try:
        stored: dict[str, Any] = json.loads((directory / "job.json").read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"{directory}: no job was launched there; name the run's directory, such as runs/demo"
        ) from None
    except ValueError as error:
        raise ConfigError(
            f"{directory / 'job.json'}: not valid JSON ({error}); launch the run again"
        ) from None
    return Job(**{**stored, "cluster": build(ClusterConfig, stored["cluster"])})


def job_ids(directory: Path) -> list[str]:
    """Slurm's numbers of a run's jobs, oldest first."""
    path = directory / "job_id"
    return path.read_text().split() if path.is_file() else []


def last_heartbeat(directory: Path) -> dict[str, Any] | None:
    """The last heartbeat of a run's newest job; None before the first."""
    path = directory / "heartbeat.json"
    return json.loads(path.read_text()) if path.is_file() else None


def note_id(directory: Path, job_id: str) -> None:
    """Appends a job's number, unless the batch script was faster.

    That may even have submitted the next job by now.
    """
    if job_id not in job_ids(directory):
        with (directory / "job_id").open("a") as file:
            file.write(f"{job_id}\n")
