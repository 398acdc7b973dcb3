"""Slurm's commands, each within a bounded time and with one line where it fails."""

import getpass
import shutil
import subprocess

from megatron_opd.cluster.profile import ClusterConfig, seconds
from megatron_opd.errors import ConfigError

TIMEOUT = 60  # seconds; a controller that is busy answers late


def ask(*command: str) -> str:
    """The output of a Slurm command. Raises ConfigError with the command's last line of errors."""
    if shutil.which(command[0]) is None:
        raise ConfigError(
            f"{command[0]}: not found; this is no machine of a Slurm cluster, go to its login node"
        )
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"{command[0]}: no answer within {TIMEOUT} seconds; is the Slurm controller up?"
        ) from None
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.strip()]
        raise ConfigError(f"{command[0]}: {errors[-1] if errors else 'failed'}")
    return done.stdout


def check_place(cluster: ClusterConfig) -> None:
    """Checks that partition and account exist and allow the job's nodes and time.

    Raises ConfigError.
    """
    rows = [line.split("|") for line in ask("sinfo", "-h", "-o", "%R|%P|%D|%l").splitlines()]
    default = next((name for name, starred, _nodes, _limit in rows if starred.endswith("*")), "")
    partitions = {name: (int(nodes), limit) for name, _starred, nodes, limit in rows}
    partition = cluster.partition or default
    if partition and partition not in partitions:
        names = ", ".join(sorted(partitions))
        raise ConfigError(f"cluster.partition: {partition} is none of this cluster's: {names}")
    if partition:
        _check_partition(cluster, partition, *partitions[partition])
    associations = ask(
        "sacctmgr", "-n", "-P", "list", "association", "format=account", f"user={getpass.getuser()}"
    )
    accounts = sorted(set(associations.split()))
    if cluster.account and accounts and cluster.account not in accounts:
        raise ConfigError(
            f"cluster.account: {cluster.account} is none of yours: {', '.join(accounts)}"
        )


def _check_partition(cluster: ClusterConfig, partition: str, nodes: int, limit: str) -> None:
    if cluster.nodes > nodes:
        raise ConfigError(
            f"cluster.nodes: {cluster.nodes} are more than the {nodes} of partition {partition}"
        )
    # Slurm would let the job wait for ever; but a QoS may be allowed to exceed the limit.
    if cluster.time and not cluster.qos and seconds(cluster.time) > seconds(limit):
        raise ConfigError(
            f"cluster.time: {cluster.time} is more than the {limit} of partition {partition}"
        )


def state(job_id: str) -> str:
    """A job's state, such as PENDING, RUNNING or TIMEOUT; with the reason where it waits."""
    if queued := _queued(job_id):
        name, _, reason = queued.partition(" ")
        return f"{name} ({reason})" if reason not in ("", "None") else name
    finished = ask("sacct", "-X", "-n", "-P", "-j", job_id, "-o", "State").splitlines()
    return finished[-1] if finished else "unknown to Slurm"


def in_queue(job_id: str) -> bool:
    """True when a job waits, runs or ends."""
    return bool(_queued(job_id))


def _queued(job_id: str) -> str:
    """State and reason of a job in the queue, else "".

    Slurm forgets a job some minutes after its end.
    """
    try:
        return ask("squeue", "-h", "-j", job_id, "-o", "%T %r").strip()
    except ConfigError as error:
        if "Invalid job id" in str(error):
            return ""
        raise
