"""`megatron-opd launch`: everything that can be checked is checked, then nemo-run submits the job."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from megatron_opd.cluster import job as jobs
from megatron_opd.cluster import script, slurm
from megatron_opd.cluster.job import Job
from megatron_opd.cluster.profile import PREFIX, PROFILES, ClusterConfig, load_profile
from megatron_opd.config.check import check_run_directory
from megatron_opd.config.load import dump_config, load_config
from megatron_opd.config.schema import RunConfig
from megatron_opd.errors import ConfigError
from megatron_opd.preflight import check_recipe, check_resumed

LAUNCHER = Path(__file__).resolve().parents[2] / ".venv-launch" / "bin" / "python"


def launch(recipe: str, cluster: str, overrides: Sequence[str], *, dry_run: bool, prepare: bool) -> int:
    """Submits a recipe; with `dry_run` prints the batch script; with `prepare` writes everything but submits nothing.

    Raises ConfigError, DataError.
    """
    of_cluster = [each.removeprefix(PREFIX) for each in overrides if each.startswith(PREFIX)]
    profile = load_profile(cluster, of_cluster)
    config = load_config(recipe, [each for each in overrides if not each.startswith(PREFIX)])
    if not prepare and not LAUNCHER.exists():
        raise ConfigError(
            f"launch: nemo-run is not installed, {LAUNCHER} does not exist; run: make launch-env, or see --prepare"
        )
    job = jobs.make(config, profile, sys.executable)
    for warning in _check(config, job, dry_run=dry_run):
        print(f"megatron-opd: warning: {warning}", file=sys.stderr)
    if not dry_run:
        _write(job, config)
    if prepare:
        batch = job.directory / "train.sbatch"
        batch.write_text(script.sbatch(job))
        print(f"sbatch {_short(str(batch))}")
        return 0
    output = _nemo_run(job, dry_run=dry_run)
    if dry_run:
        print(output, end="")
        return 0
    (job.directory / "job_id").write_text(f"{output}\n")
    run_dir = _short(job.run_dir)
    print(f"job {output}: {config.name} on {profile.nodes} x {profile.processes_per_node} processes, into {run_dir}")
    for command in ("status", "logs", "cancel"):
        print(f"  megatron-opd {command} {run_dir}")
    return 0


def _check(config: RunConfig, job: Job, *, dry_run: bool) -> list[str]:
    """Returns warnings. A dry run may be made where there is no Slurm, and no model or data yet."""
    fits(config, job.cluster)
    if dry_run:
        return []
    slurm.check_place(job.cluster.partition, job.cluster.nodes, job.cluster.account)
    warnings = check_recipe(config, world_size=job.processes)
    is_run = (Path(job.run_dir) / "config.yaml").is_file()
    check_run_directory(config, resume=is_run)
    if is_run:
        check_resumed(config)
    for job_id in jobs.job_ids(job.directory):
        if slurm.in_queue(job_id):
            raise ConfigError(f"run_dir: job {job_id} works on {job.run_dir}; cancel it first, or give run_dir=...")
    return warnings


def fits(config: RunConfig, cluster: ClusterConfig) -> None:
    """Raises ConfigError unless the recipe's layouts divide the job's processes and its memory plan fits."""
    from megatron_opd.planning.architectures import architectures
    from megatron_opd.planning.case import Case
    from megatron_opd.planning.hardware import hardware
    from megatron_opd.planning.layouts import candidate

    gpus = cluster.nodes * cluster.processes_per_node
    device = hardware(cluster.gpu, cluster.processes_per_node)
    case = Case(config, architectures(config)[0], device, gpus, cluster.processes_per_node)
    case.check()
    lacks = candidate(case).lacks
    if lacks:
        raise ConfigError(
            f"cluster.nodes: the recipe does not fit {gpus} x {cluster.gpu} ({lacks}); see: megatron-opd plan "
            f"{config.name} --gpus {gpus} --gpu {cluster.gpu}"
        )


def _write(job: Job, config: RunConfig) -> None:
    """The job's directory, anew but for its logs."""
    (job.directory / "logs").mkdir(parents=True, exist_ok=True)
    for name in ("cancelled", "verdict", "failures", "newest", "heartbeat.json"):
        (job.directory / name).unlink(missing_ok=True)
    (job.directory / "excluded").write_text(f"{job.cluster.exclude}\n" if job.cluster.exclude else "")
    (job.directory / "recipe.yaml").write_text(dump_config(replace(config, run_dir=job.run_dir)))
    job.write()


def _nemo_run(job: Job, *, dry_run: bool) -> str:
    """The batch script, or the number of the submitted job."""
    spec = {
        "name": job.name,
        "logs": str(job.directory / "logs"),
        "flags": script.flags(job),
        "environment": job.environment(),
        "setup": [*job.cluster.setup, script.when_it_ends(job)],
        "container": asdict(job.cluster.container) if job.cluster.container else None,
        "command": job.command(),
    }
    with tempfile.TemporaryDirectory(prefix="megatron-opd-") as folder:
        home = Path(folder) if dry_run else job.directory / "nemo-run"
        written = (Path(folder) if dry_run else job.directory) / "spec.json"
        written.write_text(json.dumps(spec, indent=1))
        environment = dict(os.environ) | {"NEMORUN_HOME": str(home)}
        command = [str(LAUNCHER), str(PROFILES / "submit.py"), str(written), *(["--dry-run"] if dry_run else [])]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        scripts = sorted(home.glob("experiments/*/*/train_sbatch.sh"))
        if done.returncode or not scripts:
            said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            refused = [line for line in said if line.startswith("sbatch: error:")]
            raise ConfigError(f"launch: nemo-run could not submit: {(refused or said or ['it said nothing'])[-1]}")
        return scripts[-1].read_text() if dry_run else done.stdout.split()[-1]


def _short(path: str) -> str:
    here = Path(path)
    return str(here.relative_to(Path.cwd())) if here.is_relative_to(Path.cwd()) else path
