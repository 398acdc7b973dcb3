"""A cluster's profile (slurm/*.yaml): what a job asks of Slurm and finds on a node. No torch."""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from megatron_opd.contracts.ranges import NonNegativeInt, PositiveInt
from megatron_opd.errors import ConfigError
from megatron_opd.files.shipped import shipped
from megatron_opd.files.typed import InvalidKey, build, unknown
from megatron_opd.recipe.load import parse_override, set_key

PROFILES = shipped("slurm")
PREFIX = "cluster."  # of an override that sets a key of the profile


@dataclass(frozen=True)
class ContainerConfig:
    """Processes run in a container (pyxis: srun --container-image)."""

    image: str  # file on the shared file system (.sqsh), or registry#image:tag
    # host:container; run directories, models and data must be there
    mounts: list[str] = field(default_factory=list)
    python: str = "python"  # an interpreter in it, with this package installed


@dataclass(frozen=True)
class TunnelConfig:
    """The cluster's login node, for launching from a machine outside: SSH with keys."""

    host: str  # name or address of the login node
    user: str  # your name there
    # on the cluster: a checkout with its .venv, in which the recipe's relative paths hold
    directory: str
    identity: str = ""  # file of the private key; "": what ssh finds by itself
    port: PositiveInt = 22  # of its SSH server


@dataclass(frozen=True)
class ClusterConfig:
    """Keys that are empty or null are not given to Slurm."""

    gpu: Literal["a100", "h100", "h800", "cpu"]  # whose memory the recipe's plan must fit
    processes_per_node: PositiveInt  # one for each GPU
    gpus_per_node: NonNegativeInt = 0  # asked of Slurm; 0 with gpu=cpu
    nodes: PositiveInt = 1  # of the job
    cpus_per_process: PositiveInt | None = None  # cores; null: what Slurm gives
    memory: str | None = None  # of a node, such as 900G; "0": all of it
    exclusive: bool = False  # whole nodes
    account: str = ""  # whose hours the job uses
    partition: str = ""  # that the job waits in
    qos: str = ""  # quality of service
    reservation: str = ""  # nodes that were set aside
    constraint: str = ""  # features that a node must have
    exclude: str = ""  # nodes that the job must not get, as Slurm writes lists
    time: str = "04:00:00"  # wall-clock limit of one job; the run is continued by the next one
    # ahead of that limit: a step and a checkpoint must be done by then
    save_before_seconds: PositiveInt = 300
    # deaths without a new checkpoint between them, after which the run stays down
    max_failures: NonNegativeInt = 3
    start_minutes: PositiveInt = 10  # for all nodes to report, and for an all-reduce over them
    node_check: str = ""  # shell command that a node must pass, such as a site's GPU diagnosis
    environment: dict[str, str] = field(default_factory=dict)  # variables of the processes
    # names of variables that come with you and are written nowhere
    secrets: list[str] = field(default_factory=list)
    # shell lines before the processes start: module load ...
    setup: list[str] = field(default_factory=list)
    container: ContainerConfig | None = None  # null: the environment from which the job is launched
    python: str = ""  # another interpreter, on the shared file system
    tunnel: TunnelConfig | None = None  # null: this machine is the cluster's


def load_profile(name: str, overrides: Sequence[str] = ()) -> ClusterConfig:
    """Reads a profile: a file, or the name of one in slurm/.

    Overrides are "key=value" without the prefix. Raises ConfigError, one line that names the
    file or the override, and the key.
    """
    path = _find(name)
    try:
        tree = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except (YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot be read as YAML ({str(error).splitlines()[0]})"
        ) from None
    source = str(path)
    try:
        profile = build(ClusterConfig, tree)
        for text in overrides:
            source = f"override {PREFIX}{text!r}"
            key, value = parse_override(text)
            set_key(tree, key.split("."), value)
            profile = build(ClusterConfig, tree)
    except InvalidKey as error:
        raise ConfigError(f"{source}: {error}") from None
    return _check(profile, path)


def seconds(time: str) -> float:
    """The seconds of a time as Slurm writes it. Raises ValueError.

    Its forms: 30 (minutes), 30:00, 4:00:00, 1-12, 1-12:30, 1-12:30:00, and words for no limit.
    """
    if time.lower() in ("0", "infinite", "unlimited", "n/a"):
        return math.inf
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if not match:
        raise ValueError(
            f"{time} is no time as Slurm writes it; write hours:minutes:seconds, or "
            "days-hours:minutes"
        )
    days, hours, minutes, seconds = (int(number or 0) for number in match.groups())
    if match[1] is None and match[4] is None:  # minutes, or minutes:seconds
        return hours * 60 + minutes
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _find(name: str) -> Path:
    path = Path(name)
    known = {profile.stem: profile for profile in sorted(PROFILES.glob("*.yaml"))}
    if path.is_file():
        return path
    if name in known:
        return known[name]
    raise ConfigError(f"--cluster: {name}: no such file; {unknown('profile', name, known)}")


def _check(profile: ClusterConfig, path: Path) -> ClusterConfig:
    if profile.gpu == "cpu" and profile.gpus_per_node:
        raise ConfigError(f"{path}: gpus_per_node: no effect with gpu=cpu; remove it")
    if profile.gpu != "cpu" and profile.gpus_per_node != profile.processes_per_node:
        raise ConfigError(
            f"{path}: processes_per_node: {profile.processes_per_node} is not "
            f"gpus_per_node={profile.gpus_per_node}; every process has one GPU"
        )
    _check_time(profile, path)
    if profile.tunnel:
        return _check_tunnel(profile, profile.tunnel, path)
    return replace(profile, python=str(Path(profile.python).expanduser()) if profile.python else "")


def check_present(profile: ClusterConfig) -> None:
    """Checks what the job brings along from this machine. Raises ConfigError."""
    for name in profile.secrets:
        if name not in os.environ:
            raise ConfigError(
                f"cluster.secrets: {name} is not set in your environment; export it first"
            )
    if profile.container:
        image = Path(profile.container.image)
        if image.is_absolute() and not image.exists():
            raise ConfigError(f"cluster.container.image: {image} does not exist")
        for mount in profile.container.mounts:
            if not Path(mount.split(":")[0]).exists():
                raise ConfigError(f"cluster.container.mounts: {mount.split(':')[0]} does not exist")


def _check_time(profile: ClusterConfig, path: Path) -> None:
    try:
        limit = seconds(profile.time) if profile.time else math.inf
    except ValueError as error:
        raise ConfigError(f"{path}: time: {error}") from None
    if profile.save_before_seconds >= limit:
        raise ConfigError(
            f"{path}: save_before_seconds: {profile.save_before_seconds} are not less than "
            f"time={profile.time}; a job would be asked to save before it has begun"
        )


def _check_tunnel(profile: ClusterConfig, tunnel: TunnelConfig, path: Path) -> ClusterConfig:
    """Checks the tunnel. Files on the cluster are checked there."""
    if not Path(tunnel.directory).is_absolute():
        raise ConfigError(
            f"{path}: tunnel.directory: {tunnel.directory} is no absolute path of the cluster's"
        )
    identity = Path(tunnel.identity).expanduser()
    if tunnel.identity and not identity.is_file():
        raise ConfigError(f"{path}: tunnel.identity: {identity} does not exist")
    return replace(
        profile, tunnel=replace(tunnel, identity=str(identity) if tunnel.identity else "")
    )
