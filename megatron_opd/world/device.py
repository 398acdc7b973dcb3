"""Where a process computes: CUDA with NCCL, or the host with gloo."""

import glob
import os
from functools import cache
from typing import Literal, NamedTuple

import torch

from megatron_opd.errors import ConfigError
from megatron_opd.world.host import VARIABLE, host_reason, wished_device


class Choice(NamedTuple):
    """Where a process computes, and why."""

    kind: Literal["cuda", "cpu"]
    reason: str


@cache
def choice() -> Choice:
    """Choose CUDA where it is usable and vLLM is not one for CPUs alone, or as MEGATRON_OPD_DEVICE
    (cpu or cuda) says.

    Raises ConfigError where there is a GPU that torch cannot use, and where cuda is asked for in
    vain.
    """
    if reason := host_reason():
        return Choice("cpu", reason)
    if torch.cuda.is_available():
        return Choice("cuda", f"{VARIABLE}=cuda" if wished_device() else "CUDA is usable")
    if gpu_is_there():
        of_cuda = f"its CUDA {torch.version.cuda} needs a newer driver"
        remedy = of_cuda if torch.version.cuda else "it has no CUDA"
        raise ConfigError(
            f"a GPU is there, but torch cannot use it: {remedy}; nvidia-smi names the driver, "
            f"{VARIABLE}=cpu runs on the host"
        )
    if wished_device():
        raise ConfigError(
            f"{VARIABLE}=cuda: torch finds no usable CUDA device; unset it to run on the host"
        )
    return Choice("cpu", "torch finds no usable CUDA device")


def gpu_is_there() -> bool:
    """Whether this machine has an NVIDIA GPU that is not hidden from the process."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1") and bool(
        glob.glob("/dev/nvidia[0-9]*")
    )


def device() -> torch.device:
    """This process's device: its CUDA device under torchrun's LOCAL_RANK, or the host.

    A launcher may show each process its own device alone: the number is taken modulo the visible
    devices.
    """
    if choice().kind == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    return torch.device("cpu")


def backend() -> str:
    """The collective library for the default process group."""
    return "nccl" if choice().kind == "cuda" else "gloo"
