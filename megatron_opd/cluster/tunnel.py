"""Launching from outside of the cluster, over SSH.

The login node has a checkout with its environment, as every node has. `megatron-opd launch
--prepare` there checks the recipe and writes the job's directory; only the submission itself is
made from here.
"""

import io
import json
import shlex
import shutil
import subprocess
import sys
import tarfile
from dataclasses import asdict, replace

from megatron_opd.cluster import script
from megatron_opd.cluster.job import Job
from megatron_opd.cluster.profile import TunnelConfig
from megatron_opd.errors import ConfigError

SECONDS = 300  # for the checks: they read the models' files

_PREPARE = """\
set -e
cd {directory}
there=$(mktemp -d)
trap 'rm -rf "$there"' EXIT
tar -x -C "$there"
{python} -m megatron_opd launch "$there"/{name}.yaml --cluster "$there"/cluster.yaml --prepare"""


def prepare(tunnel: TunnelConfig, job: Job, recipe: str) -> None:
    """Checks everything and writes RUN.job on the cluster, and prints the warnings from there.

    Raises ConfigError.
    """
    profile = json.dumps(asdict(replace(job.cluster, tunnel=None)))  # JSON is YAML
    files = io.BytesIO()
    with tarfile.open(fileobj=files, mode="w") as archive:
        for name, text in ((f"{job.name}.yaml", recipe), ("cluster.yaml", profile)):
            entry = tarfile.TarInfo(name)
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))
    python = shlex.quote(f"{tunnel.directory}/.venv/bin/python")
    script = _PREPARE.format(
        directory=shlex.quote(tunnel.directory), python=python, name=shlex.quote(job.name)
    )
    for line in _run(tunnel, script, files.getvalue()):
        print(line, file=sys.stderr)


def submitted(tunnel: TunnelConfig, job: Job, job_id: str) -> None:
    """Leaves the job's number where `status`, `logs` and `cancel` look for it."""
    _run(tunnel, script.note_id(job_id, shlex.quote(str(job.directory / "job_id"))))


def command(tunnel: TunnelConfig, line: str) -> str:
    """A shell line that runs `line` in the checkout on the cluster."""
    return shlex.join([*_ssh(tunnel), f"cd {shlex.quote(tunnel.directory)} && {line}"])


def _run(tunnel: TunnelConfig, script: str, stdin: bytes = b"") -> list[str]:
    """Runs shell lines on the login node; returns the lines of standard error.

    Raises ConfigError.
    """
    if shutil.which("ssh") is None:
        raise ConfigError("tunnel: ssh is not installed here")
    try:
        done = subprocess.run(
            [*_ssh(tunnel), script], input=stdin, capture_output=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"tunnel.host: no answer from {tunnel.host} within {SECONDS} seconds"
        ) from None
    errors = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
    if done.returncode:
        last = errors[-1] if errors else f"ended with {done.returncode}"
        raise ConfigError(f"{tunnel.host}: {last.removeprefix('megatron-opd: error: ')}")
    return errors


def _ssh(tunnel: TunnelConfig) -> list[str]:
    identity = ["-i", tunnel.identity] if tunnel.identity else []
    return [
        "ssh",
        "-o",
        "BatchMode=yes",
        "-p",
        str(tunnel.port),
        *identity,
        f"{tunnel.user}@{tunnel.host}",
    ]
