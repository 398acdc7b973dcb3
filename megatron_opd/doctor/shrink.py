"""A recipe's models in small: random weights, and every switch of their config.json that counts."""

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_opd.architectures.architecture import Architecture, architecture_of
from megatron_opd.architectures.config import LayoutConfig, ModelConfig
from megatron_opd.recipe.keys import LossScaleConfig, RunConfig
from megatron_opd.weights.hf import companions

HEAD_DIM = 32  # vLLM's attention on a CPU wants at least that
PER_REPLICA = 4  # prompts
LONGEST = 64  # tokens of a sequence
# Suffix of a directory with other weights of the same architecture.
OTHER = "_other"


def shrink(config: RunConfig, folder: Path, nproc: int) -> RunConfig:
    """Writes small models to `folder`; returns the recipe with them in the place of its own.

    They are student, teacher, and another of each (suffix OTHER). Layouts, method and
    temperature stay; numbers are float32, so that layouts can be compared; the learning rate is one
    that moves a small model.
    """
    models = [model for model in (config.student, config.teacher) if model]
    sizes = sorted({architecture_of(model).vocab_size for model in models})
    # The order of sizes stays, and so does their remainder among tensor-parallel ranks.
    vocabularies = {size: 64 * (2 + rank) + size % 64 for rank, size in enumerate(sizes)}
    layouts = [model.layout for model in models]
    for seed, (name, model) in enumerate(zip(("student", "teacher"), models, strict=False)):
        arch = architecture_of(model)
        small = _small_config(model, arch, layouts, vocabularies[arch.vocab_size])
        # One tokenizer: real vocabularies have more tokens in common than the small ones hold.
        _write(small, Path(config.student.path), folder / name, seed=2 * seed)
        _write(small, Path(config.student.path), folder / f"{name}{OTHER}", seed=2 * seed + 1)
    updates = config.train.updates_per_step
    replicas = (
        nproc - sum(config.processes_apart.values())
    ) // config.student.layout.model_parallel_size
    optimizer = replace(
        config.train.optimizer, lr=1e-3, min_lr=0.0, schedule="constant", warmup_steps=0
    )
    return replace(
        config,
        student=replace(config.student, path=str(folder / "student")),
        teacher=config.teacher and replace(config.teacher, path=str(folder / "teacher")),
        precision="float32",
        num_steps=1000,
        max_sequence_length=LONGEST,
        eval=None,
        train=replace(
            config.train,
            optimizer=optimizer,
            micro_batch_tokens=LONGEST * 3 // 2,
            loss_scale=LossScaleConfig(),
        ),
        rollout=replace(
            config.rollout,
            num_prompts=updates * replicas * -(-PER_REPLICA // replicas),
            samples_per_prompt=4,
            max_completion_tokens=16,
            kv_cache_gib=1 / 16,
        ),
        run_dir=str(folder / "layout"),
    )


def alone(config: RunConfig) -> RunConfig:
    """The recipe on one process, with all sequences at once and whole logits."""
    everything = config.rollout.num_prompts * config.rollout.samples_per_prompt
    return replace(
        config,
        student=replace(config.student, layout=LayoutConfig()),
        teacher=config.teacher and replace(config.teacher, layout=LayoutConfig(), processes=None),
        rollout=replace(config.rollout, processes=None),
        train=replace(
            config.train, micro_batch_tokens=everything * LONGEST, fused_output_layer=False
        ),
    )


def _model_parallel(layout: LayoutConfig) -> tuple[int, int]:
    return layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size


def _small_config(
    model: ModelConfig, arch: Architecture, layouts: list[LayoutConfig], vocab_size: int
) -> Any:
    """A config.json that fits every layout of the recipe: the student can be its own teacher."""
    import transformers

    sizes = [_model_parallel(layout) for layout in layouts]
    tensor = math.lcm(*(size[0] for size in sizes))
    stages = math.lcm(*(size[1] for size in sizes))
    groups = tensor * min(max(arch.num_key_value_heads // tensor, 1), 2)
    heads = groups * min(arch.num_attention_heads // arch.num_key_value_heads, 2)
    # hidden size = heads x head size
    derived = arch.num_attention_heads * arch.head_dim == arch.hidden_size
    original = transformers.AutoConfig.from_pretrained(model.path)
    keys = original.to_dict()
    keys.pop("layer_types", None)  # one per layer
    changes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": heads * HEAD_DIM // (1 if derived else 2),
        "num_hidden_layers": 2 * stages,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": 48 * tensor,
        "eos_token_id": 1,
        "bos_token_id": None,
        "pad_token_id": None,
        "initializer_range": 1.1 / (heads * HEAD_DIM) ** 0.5,
    }
    if "head_dim" in keys:
        changes["head_dim"] = HEAD_DIM
    if arch.experts:
        per_token = min(arch.experts.per_token, 2)
        ranks = model.layout.expert_model_parallel_size
        width = 24 * model.layout.expert_tensor_parallel_size
        count = ranks * -(-2 * per_token // ranks)
        keys.pop("num_local_experts", None)  # another name of the count
        changes |= {
            "num_experts": count,
            "num_experts_per_tok": per_token,
            "moe_intermediate_size": width,
        }
    return type(original).from_dict(keys | changes)


def _write(config: Any, tokenizer_dir: Path, directory: Path, *, seed: int) -> None:
    import transformers

    transformers.logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            # left at ones and zeros, a parameter that is lost would not be missed
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    for path in companions(tokenizer_dir):
        if path.name not in ("config.json", "generation_config.json"):
            shutil.copyfile(path, directory / path.name)
