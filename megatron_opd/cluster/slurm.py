"""Slurm's commands, each within a bounded time and with one line where it fails."""

import getpass
import shutil
import subprocess

from megatron_opd.errors import ConfigError

TIMEOUT = 60  # seconds; a controller that is busy answers late


def run(*command: str) -> str:
    """The output of a Slurm command. Raises ConfigError with what it said."""
    if shutil.which(command[0]) is None:
        raise ConfigError(f"{command[0]}: not found; this is no machine of a Slurm cluster, go to its login node")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{command[0]}: no answer within {TIMEOUT} seconds; is the Slurm controller up?") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise ConfigError(f"{command[0]}: {said[-1] if said else 'failed'}")
    return done.stdout


def check_place(partition: str, nodes: int, account: str) -> None:
    """Whether partition and account exist, and have so many nodes. Raises ConfigError naming what there is."""
    partitions = sorted(set(run("sinfo", "-h", "-o", "%R").split()))
    if partition and partition not in partitions:
        raise ConfigError(f"cluster.partition: {partition} is none of this cluster's: {', '.join(partitions)}")
    there = int(run("sinfo", "-h", "-o", "%D", "-p", partition).split()[0]) if partition else nodes
    if nodes > there:
        raise ConfigError(f"cluster.nodes: {nodes} are more than the {there} of partition {partition}")
    mine = run("sacctmgr", "-n", "-P", "list", "association", "format=account", f"user={getpass.getuser()}")
    accounts = sorted(set(mine.split()))
    if account and accounts and account not in accounts:
        raise ConfigError(f"cluster.account: {account} is none of yours: {', '.join(accounts)}")


def state(job_id: str) -> str:
    """Such as PENDING, RUNNING, COMPLETED, TIMEOUT; with the reason where it waits."""
    if in_queue(job_id):
        name, _, reason = run("squeue", "-h", "-j", job_id, "-o", "%T %r").strip().partition(" ")
        return f"{name} ({reason})" if reason not in ("", "None") else name
    finished = run("sacct", "-X", "-n", "-P", "-j", job_id, "-o", "State").splitlines()
    return finished[-1] if finished else "unknown to Slurm"


def in_queue(job_id: str) -> bool:
    return job_id in run("squeue", "-h", "-o", "%A").split()
