"""The place of a process in its job, from Slurm's variables."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    rank: int
    world_size: int
    local_rank: int
    node: str
    nodes: list[str]  # in Slurm's order; rank 0 is on the first
    job_id: str
    attempt: str  # job and restart: two attempts never read each other's files

    @classmethod
    def from_slurm(cls) -> "Place":
        restart = os.environ.get("SLURM_RESTART_COUNT", "0")
        return cls(
            rank=int(os.environ["SLURM_PROCID"]),
            world_size=int(os.environ["SLURM_NTASKS"]),
            local_rank=int(os.environ["SLURM_LOCALID"]),
            node=os.environ["SLURMD_NODENAME"],
            nodes=expand(os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_JOB_NODELIST"]),
            job_id=os.environ["SLURM_JOB_ID"],
            attempt=f"{os.environ['SLURM_JOB_ID']}-{restart}",
        )

    @property
    def per_node(self) -> int:
        """The number of processes on a node."""
        return self.world_size // len(self.nodes)


def expand(nodelist: str) -> list[str]:
    """The names in Slurm's short form: "gpu[01-02,7],login" is gpu01, gpu02, gpu7, login."""
    names = []
    unread = nodelist
    while unread:
        prefix, bracket, after = unread.partition("[")
        if not bracket or "," in prefix:
            name, _, unread = unread.partition(",")
            names.append(name)
            continue
        inside, _, unread = after.partition("]")
        suffix, _, unread = unread.partition(",")
        for interval in inside.split(","):
            first, _, last = interval.partition("-")
            numbers = range(int(first), int(last or first) + 1)
            names += [f"{prefix}{number:0{len(first)}d}{suffix}" for number in numbers]
    return names
