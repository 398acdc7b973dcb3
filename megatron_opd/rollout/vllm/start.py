"""The start of vLLM."""

import logging
import os
from typing import TYPE_CHECKING

import torch

from megatron_opd.architectures.architecture import architecture_of, engine_changes
from megatron_opd.architectures.config import ModelConfig
from megatron_opd.errors import ConfigError
from megatron_opd.recipe.keys import RolloutConfig
from megatron_opd.rollout.vllm.host_process import QUIET, executor_backend

if TYPE_CHECKING:
    from vllm import LLM

# Numbers of requests in a step of decoding; others are padded to the next.
_GRAPH_SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 384, 512]
_CPU_BATCHED_TOKENS = 4096  # tokens of a step's prompts, vLLM's default


def start_vllm(
    model: ModelConfig,
    config: RolloutConfig,
    device: torch.device,
    precision: str,
    max_sequence_length: int,
    seed: int,
    sleeps: bool,
    empty: bool,
) -> "LLM":
    """The model in vLLM, with settings for training: its samples are the policy's own.

    With `empty`, only config and tokenizer are read from `model.path`, and every weight is 0.
    """
    from vllm import LLM

    from megatron_opd.rollout.vllm.empty_weights import EMPTY

    platform = _on_cpu(config, max_sequence_length)
    if device.type == "cuda":
        platform = _on_gpu(config, sleeps)
    llm = LLM(
        model=model.path,
        load_format=EMPTY if empty else "hf",
        # Beside these files Mistral's directories hold others, which vLLM would prefer.
        config_format="hf",
        tokenizer_mode="hf",
        hf_overrides=engine_changes(model),
        dtype=precision,
        max_model_len=max_sequence_length,
        seed=seed,
        tensor_parallel_size=1,
        distributed_executor_backend=executor_backend(),
        # Logprobs are of the distribution sampled from, not of temperature 1.
        logprobs_mode="processed_logprobs",
        enable_prefix_caching=True,
        use_tqdm_on_load=False,
        **platform,
    )
    # It would end the process's default group, the trainer's, as soon as this engine is dropped.
    llm.llm_engine.engine_core._finalizer.detach()
    if os.environ["VLLM_LOGGING_LEVEL"] == QUIET:
        # vLLM would write the whole input of a step that fails, some 60 kB, before the error.
        logging.getLogger("vllm.logging_utils.dump_input").setLevel(logging.CRITICAL)
    return llm


def _on_gpu(config: RolloutConfig, sleeps: bool) -> dict[str, object]:
    return {
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "enable_sleep_mode": sleeps,
        # Decoding replays CUDA graphs: 3.6 times as fast as kernel by kernel (docs/hardware.md).
        "compilation_config": {
            "mode": 0,  # no torch.compile: a minute at every start
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": _GRAPH_SIZES,
        },
    }


def _on_cpu(config: RolloutConfig, max_sequence_length: int) -> dict[str, object]:
    return {
        "kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30),
        "enforce_eager": True,
        # A prompt in several steps moves its request's generator, which a CPU's cannot do: the
        # engine would end.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(_CPU_BATCHED_TOKENS, max_sequence_length),
    }


def check_context(model: ModelConfig, max_sequence_length: int) -> None:
    """Raises ConfigError when the model has fewer positions."""
    limit = architecture_of(model).max_position_embeddings
    if max_sequence_length > limit:
        raise ConfigError(
            f"max_sequence_length={max_sequence_length} is more than {model.path}/config.json "
            f"allows (max_position_embeddings={limit}); lower it"
        )
