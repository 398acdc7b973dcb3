"""`megatron-opd launch`: checks everything that can be checked, then nemo-run submits the job."""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megatron_opd.checks.recipe import check_run_directory
from megatron_opd.checks.training import check_recipe, check_resumed
from megatron_opd.cluster import job as jobs
from megatron_opd.cluster import script, slurm, tunnel
from megatron_opd.cluster.job import Job
from megatron_opd.cluster.profile import (
    PREFIX,
    PROFILES,
    ClusterConfig,
    check_present,
    load_profile,
)
from megatron_opd.errors import ConfigError
from megatron_opd.files.shipped import PACKAGE
from megatron_opd.metrics.run_directory import disk_may_be_full
from megatron_opd.recipe.keys import RunConfig
from megatron_opd.recipe.load import dump_config, load_config
from megatron_opd.start import load_run, to_resume

LAUNCHER = Path(".venv-launch") / "bin" / "python"  # in the checkout, or in the working directory


def launch(
    recipe: str, cluster: str, overrides: Sequence[str], *, dry_run: bool, prepare: bool
) -> int:
    """Submits a recipe.

    With `dry_run` it only prints the batch script, which takes no Slurm, model or data yet. With
    `prepare` it writes everything but submits nothing. Raises ConfigError, DataError.
    """
    of_cluster = [text.removeprefix(PREFIX) for text in overrides if text.startswith(PREFIX)]
    of_recipe = [text for text in overrides if not text.startswith(PREFIX)]
    profile = load_profile(cluster, of_cluster)
    # At the other end of a tunnel a directory of this machine is no run.
    load = load_config if profile.tunnel else load_run
    config = load(recipe, of_recipe)
    if not prepare:
        _launcher()
    job = jobs.make(config, profile, sys.executable)
    with (
        disk_may_be_full(job.directory, "launch it again"),
        tempfile.TemporaryDirectory(prefix="megatron-opd-") as temporary,
    ):
        if dry_run:
            fits(config, profile)
            batch_script = _nemo_run(job, Path(temporary), dry_run=True)
            print(batch_script.replace(temporary, str(job.directory)))
            return 0
        if profile.tunnel:
            tunnel.prepare(profile.tunnel, job, dump_config(config))
        else:
            _warn(_check(config, job))
            _write(job, config)
        if prepare:
            print(f"sbatch {job.directory / 'train.sbatch'}")
            return 0
        folder = Path(temporary) if profile.tunnel else job.directory
        job_id = _nemo_run(job, folder, dry_run=False)
    if profile.tunnel:
        tunnel.submitted(profile.tunnel, job, job_id)
    else:
        with disk_may_be_full(job.directory, f"let job {job_id} run: it is in the queue"):
            jobs.note_id(job.directory, job_id)
    again = ["megatron-opd", "launch", recipe, *overrides, "--cluster", cluster]
    _say_what_next(job, job_id, again)
    return 0


def _launcher() -> Path:
    """The interpreter that has nemo-run. Raises ConfigError."""
    paths = [folder / LAUNCHER for folder in (PACKAGE.parent, Path.cwd())]
    for path in paths:
        if path.exists():
            return path
    if (PACKAGE.parent / "Makefile").is_file():
        remedy = "run: make launch-env"
    else:
        pinned = "pip install nemo-run==0.11.1 'leptonai<0.47'"  # as pyproject.toml's group launch
        remedy = f"run: python3.12 -m venv .venv-launch && .venv-launch/bin/{pinned}"
    raise ConfigError(
        f"launch: nemo-run is not installed, {paths[-1]} does not exist; {remedy}, or see --prepare"
    )


def _say_what_next(job: Job, job_id: str, again: Sequence[str]) -> None:
    outside = job.cluster.tunnel
    home = Path(job.working_dir)
    run_dir = Path(job.run_dir)
    run_dir = run_dir.relative_to(home) if run_dir.is_relative_to(home) else run_dir
    sizes = f"{job.cluster.nodes} x {job.cluster.processes_per_node} processes"
    print(f"job {job_id}: {job.name} on {sizes}, into {run_dir}")
    for command in ("status", "logs", "cancel"):
        own = f"megatron-opd {command} {run_dir}"
        print(f"  {tunnel.command(outside, f'.venv/bin/{own}') if outside else own}")
    print(f"if it stays down, this goes on with it: {shlex.join(again)}")


def _warn(warnings: Sequence[str]) -> None:
    for warning in warnings:
        print(f"megatron-opd: warning: {warning}", file=sys.stderr)


def _check(config: RunConfig, job: Job) -> list[str]:
    """Checks everything, with the Slurm, the models and the data of this machine.

    Returns warnings. Raises ConfigError.
    """
    is_run = (Path(job.run_dir) / "config.yaml").is_file()
    if is_run:
        resumed = to_resume(config)
        check_resumed(resumed)
        warnings = check_recipe(resumed, world_size=job.processes)
    else:
        check_run_directory(config, resume=False)
        warnings = check_recipe(config, world_size=job.processes)
    fits(config, job.cluster)
    check_present(job.cluster)
    slurm.check_place(job.cluster)
    if is_run:
        _check_unfinished(config, job)
    for job_id in jobs.job_ids(job.directory):
        if slurm.in_queue(job_id):
            raise ConfigError(
                f"run_dir: job {job_id} works on {job.run_dir}; cancel it first, or give "
                "run_dir=..."
            )
    return warnings + unmounted(config, job)


def unmounted(config: RunConfig, job: Job) -> list[str]:
    """A warning for each path that the processes need and no mount of the container shows.

    It is no error, since a site may mount more.
    """
    if job.cluster.container is None:
        return []
    models = [model.path for model in (config.student, config.teacher) if model]
    needed = [job.working_dir, job.run_dir, *models, *config.data.paths]
    mounted = [mount.split(":")[1] for mount in job.cluster.container.mounts if ":" in mount]
    warnings = []
    for name in needed:
        path = Path(job.working_dir) / name
        if not any(path.is_relative_to(folder) for folder in mounted):
            warnings.append(
                f"cluster.container.mounts: {path} is below none of them, under that name; the "
                "processes may not see it"
            )
    return warnings


def _check_unfinished(config: RunConfig, job: Job) -> None:
    """Refuses a finished run: a job would only write the report again. Raises ConfigError."""
    beat = jobs.last_heartbeat(job.directory)
    if beat and beat["state"] == "finished" and beat["step"] >= config.num_steps:
        raise ConfigError(
            f"run_dir: {job.run_dir} is finished, {beat['step']} steps; give num_steps=... to go "
            "on, or run_dir=..."
        )


def fits(config: RunConfig, cluster: ClusterConfig) -> None:
    """Raises ConfigError unless the layouts divide the job's processes and the memory plan fits."""
    from megatron_opd.architectures.known import architectures
    from megatron_opd.planning.case import Case
    from megatron_opd.planning.hardware import hardware
    from megatron_opd.planning.layouts import candidate

    gpus = cluster.nodes * cluster.processes_per_node
    device = hardware(cluster.gpu, cluster.processes_per_node)
    case = Case(config, architectures(config.models)[0], device, gpus, cluster.processes_per_node)
    case.check()
    lacks = candidate(case).lacks
    if lacks:
        raise ConfigError(
            f"cluster.nodes: the recipe does not fit {gpus} x {cluster.gpu} ({lacks}); see: "
            f"megatron-opd plan {config.name} --gpus {gpus} --gpu {cluster.gpu}"
        )


def _write(job: Job, config: RunConfig) -> None:
    """Writes the job's directory anew; its logs stay."""
    (job.directory / "logs").mkdir(parents=True, exist_ok=True)
    for name in ("cancelled", "verdict", "failures", "newest", "heartbeat.json", "job_id"):
        (job.directory / name).unlink(missing_ok=True)
    (job.directory / "excluded").write_text(
        f"{job.cluster.exclude}\n" if job.cluster.exclude else ""
    )
    (job.directory / "recipe.yaml").write_text(dump_config(replace(config, run_dir=job.run_dir)))
    job.write()
    (job.directory / "train.sbatch").write_text(script.sbatch(job))


def _nemo_run(job: Job, folder: Path, *, dry_run: bool) -> str:
    """The batch script, or the number of the submitted job. nemo-run's files stay in `folder`."""
    container: dict[str, Any] = {}
    if job.cluster.container:
        container = asdict(job.cluster.container) | {"env": list(job.environment())}
    spec = {
        "name": job.name,
        "logs": str(job.directory / "logs"),
        "flags": script.flags(job),
        "setup": script.setup(job),
        "srun": script.SRUN,
        "container": container,
        "command": job.command(),
        "tunnel": _tunnel(job) if job.cluster.tunnel and not dry_run else None,
    }
    home = folder / "nemo-run"
    written = folder / "spec.json"
    written.write_text(json.dumps(spec, indent=1))
    environment = dict(os.environ) | {"NEMORUN_HOME": str(home)}
    command = [
        str(_launcher()),
        str(PROFILES / "submit.py"),
        str(written),
        *(["--dry-run"] if dry_run else []),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    scripts = sorted(home.glob("experiments/*/*/train_sbatch.sh"))
    if done.returncode or not scripts:
        output = (done.stdout + done.stderr).splitlines()
        lines = [line.strip() for line in output if line.strip()]
        refusals = [line for line in lines if line.startswith("sbatch: error:")]
        problem = (refusals or lines or ["it said nothing"])[-1]
        raise ConfigError(f"launch: nemo-run could not submit: {problem}")
    return scripts[-1].read_text() if dry_run else done.stdout.split()[-1]


def _tunnel(job: Job) -> dict[str, Any]:
    """nemo-run's description of the tunnel, with its folder on the cluster."""
    assert job.cluster.tunnel is not None, "asked of jobs with one"
    settings = asdict(job.cluster.tunnel)
    del settings["directory"]
    return settings | {
        "identity": settings["identity"] or None,
        "job_dir": str(job.directory / "nemo-run"),
    }
