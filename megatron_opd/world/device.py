"""The device of a process: CUDA with NCCL, or the host with gloo."""

import glob
import os
from functools import cache
from typing import Literal, NamedTuple

import torch

from megatron_opd.errors import ConfigError
from megatron_opd.world.host import VARIABLE, host_reason, wished_device


class Choice(NamedTuple):
    """The kind of device of a process, and the reason for it."""

    kind: Literal["cuda", "cpu"]
    reason: str


@cache
def choice() -> Choice:
    """The choice of a device: CUDA if it is usable and vLLM is not built for CPUs alone.

    The environment variable MEGATRON_OPD_DEVICE (cpu or cuda) decides instead, if it is set. Raises
    ConfigError for a GPU that torch cannot use, and for cuda without one.
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
    """True when this machine has an NVIDIA GPU that is not hidden from the process."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not hidden and bool(glob.glob("/dev/nvidia[0-9]*"))


def device() -> torch.device:
    """This process's device: its CUDA device under torchrun's LOCAL_RANK, or the host.

    The number is taken modulo the visible devices, since a launcher may show a process its own
    device alone.
    """
    if choice().kind == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    return torch.device("cpu")


def backend() -> str:
    """The collective library for the default process group."""
    return "nccl" if choice().kind == "cuda" else "gloo"
