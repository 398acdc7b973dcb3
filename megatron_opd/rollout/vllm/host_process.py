"""vLLM in a process of the trainer: variables for its import, and state that must not change."""

import logging
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist

QUIET = "ERROR"  # vLLM's logging level, unless VLLM_LOGGING_LEVEL names another
_ENVIRONMENT = {
    # The engine is in this process, so that weights arrive in memory.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


def prepare_environment(device: torch.device) -> None:
    """Sets vLLM's environment variables, before it is first imported."""
    os.environ.update(_ENVIRONMENT)
    level = os.environ.setdefault("VLLM_LOGGING_LEVEL", QUIET)
    # vLLM's own setting counts only from the start of an engine on.
    logging.getLogger("vllm").setLevel(level.upper())
    if device.type == "cpu":
        # vLLM would compile a few sampler functions in C++ at their first use, 4-8 s for nothing.
        os.environ["TORCHDYNAMO_DISABLE"] = "1"


@contextmanager
def trainer_state_kept(device: torch.device) -> Iterator[None]:
    """Restores global generators, environment variables and `torch.set_num_threads` at the end.

    vLLM seeds every global generator, exports variables to child processes and disables the
    function.
    """
    place = _place()
    names = ("LD_PRELOAD", "LOCAL_WORLD_SIZE", *place)
    environment = {name: os.environ.get(name) for name in names}
    os.environ.update(place)
    set_num_threads = torch.set_num_threads
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    try:
        with torch_generators_kept(device):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_num_threads = set_num_threads
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _place() -> dict[str, str]:
    """torchrun's variables that vLLM's executor reads, for this world.

    The world may not begin with torchrun's rank 0.
    """
    in_group = dist.is_initialized()
    return {
        "RANK": str(dist.get_rank() if in_group else 0),
        "WORLD_SIZE": str(dist.get_world_size() if in_group else 1),
        "LOCAL_RANK": os.environ.get("LOCAL_RANK", "0"),
    }


@contextmanager
def torch_generators_kept(device: torch.device) -> Iterator[None]:
    """Restores torch's generators at the end; vLLM draws from them even for seeded requests."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def destroy_engine_groups(*, default_group_too: bool) -> None:
    """Ends vLLM's process groups, and the default one too if vLLM, not the trainer, made it."""
    from vllm.distributed import parallel_state

    parallel_state.destroy_model_parallel()
    if default_group_too:
        parallel_state.destroy_distributed_environment()
    elif parallel_state._WORLD is not None:
        parallel_state._WORLD.destroy()
        parallel_state._WORLD = None


def executor_backend() -> str:
    """vLLM's executor: one that takes device and rank from torchrun, or the plain one."""
    return "external_launcher" if dist.is_initialized() else "uni"
