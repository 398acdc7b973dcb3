"""What `tests/forked.py` imports once: all that a run comes to import, vLLM included."""

import importlib

import torch

from megatron_opd.rollout.vllm.host_process import prepare_environment

prepare_environment(torch.device("cpu"))
for name in (
    "megatron_opd.loop",
    "megatron_opd.report.page",
    "megatron_opd.rollout.vllm.empty_weights",
    "megatron_opd.rollout.vllm.loaded_weights",
    "pytest",
    "vllm.entrypoints.llm",
    "vllm.model_executor.model_loader.reload",
    "vllm.model_executor.models.qwen3",
    "vllm.model_executor.models.qwen3_moe",
    "vllm.sampling_params",
    "vllm.v1.worker.cpu_worker",
):
    importlib.import_module(name)
