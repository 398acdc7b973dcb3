"""The parts of a job's batch script that nemo-run's and that of `sbatch` below share."""

import shlex
from typing import Any

from megatron_opd.cluster.job import Job

# Run by the batch script when it ends, however it ends. Where Slurm ends the job, after scancel or
# the loss of a node, nothing is left to decide: it starts the latter again itself. Unless the time
# limit has passed: then a save was not in time. Else the processes' verdict decides; without one
# they were killed. Those of a job that makes room for another were asked to stop, not told why.
_WHEN_IT_ENDS = """\
job_dir={job_dir}
ended() {{
    exitcode=$?
    set +e
    [ $exitcode -eq 0 ] && [ "$(cat $job_dir/verdict 2>/dev/null)" = finished ] && return
    [ -e $job_dir/cancelled ] && echo "cancelled" && return
    verdict=$(cat $job_dir/verdict 2>/dev/null || echo died)
    case $(scontrol show job -o $SLURM_JOB_ID 2>/dev/null) in
    *Reason=TimeLimit*) verdict=died ;;
    *JobState=COMPLETING*) echo "ended by Slurm" && return ;;
    *PreemptTime=[1-9]*) [ "$verdict" = stopped ] && verdict=requeue ;;
    esac
    newest=$(ls $job_dir/../{run_name}/checkpoints 2>/dev/null | tail -n 1)
    [ "$newest" = "$(cat $job_dir/newest 2>/dev/null)" ] || echo 0 >$job_dir/failures
    echo "$newest" >$job_dir/newest
    failures=$(cat $job_dir/failures 2>/dev/null || echo 0)
    echo "ended: $verdict, newest checkpoint: ${{newest:-none}}," \\
        "failures without a new one: $failures"
    case $verdict in
    requeue) scontrol requeue $SLURM_JOB_ID ;;
    exclude)
        excluded=$(paste -sd, $job_dir/excluded)
        sbatch --parsable --requeue --exclude="$excluded" "$0" >>$job_dir/job_id ;;
    died)
        if [ $failures -lt {max_failures} ]; then
            echo $((failures + 1)) >$job_dir/failures
            scontrol requeue $SLURM_JOB_ID
        fi ;;
    esac
}}
trap ended EXIT
rm -f $job_dir/verdict
{note_id}"""


# When a process fails, the others are ended. When one is done, rank 0 has 1800 s to finish writing.
SRUN = ("--kill-on-bad-exit=1", "--wait=1800")


def setup(job: Job) -> list[str]:
    """The batch script's shell lines before its srun."""
    exports = [f"export {key}={value}" for key, value in job.environment().items()]
    return [*exports, *job.cluster.setup, "", when_it_ends(job)]


def when_it_ends(job: Job) -> str:
    """Shell lines for the beginning of the batch script."""
    return _WHEN_IT_ENDS.format(
        job_dir=job.directory,
        run_name=job.run_dir.rpartition("/")[2],
        max_failures=job.cluster.max_failures,
        note_id=note_id("$SLURM_JOB_ID", "$job_dir/job_id"),
    )


def note_id(job_id: str, path: str) -> str:
    """A shell line that does what `job.note_id` does."""
    return f"grep -qx {job_id} {path} 2>/dev/null || echo {job_id} >>{path}"


def flags(job: Job) -> dict[str, Any]:
    """The flags of sbatch, by long name. The signal reaches every process ahead of the limit."""
    cluster = job.cluster
    settings: dict[str, Any] = {
        "account": cluster.account,
        "partition": cluster.partition,
        "qos": cluster.qos,
        "reservation": cluster.reservation,
        "constraint": cluster.constraint,
        "exclude": cluster.exclude,
        "nodes": cluster.nodes,
        "ntasks-per-node": cluster.processes_per_node,
        "gpus-per-node": cluster.gpus_per_node or None,
        "cpus-per-task": cluster.cpus_per_process,
        "mem": cluster.memory,
        "exclusive": cluster.exclusive or None,
        "time": cluster.time,
        "signal": f"USR1@{cluster.save_before_seconds}",
        "open-mode": "append",
    }
    return {name: value for name, value in settings.items() if value not in ("", None)}


def sbatch(job: Job) -> str:
    """A whole batch script, for sites without nemo-run.

    `megatron-opd launch --prepare` writes it into RUN.job.
    """
    log = job.directory / "logs"
    lines = [
        "#!/bin/bash",
        f"# {job.name}. Submit it with: sbatch {job.directory}/train.sbatch",
        f"# then: megatron-opd status|logs|cancel {job.run_dir}",
    ]
    options = {"job-name": job.name, "requeue": True, "output": f"{log}/batch_%j.out", **flags(job)}
    for name, value in options.items():
        lines.append(f"#SBATCH --{name}" + ("" if value is True else f"={shlex.quote(str(value))}"))
    lines += ["", *setup(job), ""]
    output = f"{log}/%j_${{SLURM_RESTART_COUNT:-0}}_%t.out"
    lines.append(
        " ".join(["srun", *SRUN, "--output", output, *_container(job), shlex.join(job.command())])
    )
    return "\n".join(lines) + "\n"


def _container(job: Job) -> list[str]:
    """The flags of srun for a container.

    `env` names the job's variables that take precedence over the image's own.
    """
    if job.cluster.container is None:
        return []
    settings = {
        "image": job.cluster.container.image,
        "mounts": ",".join(job.cluster.container.mounts),
        "env": ",".join(job.environment()),
    }
    return [f"--container-{name}={value}" for name, value in settings.items() if value]
