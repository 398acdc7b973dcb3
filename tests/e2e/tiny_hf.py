"""Tiny random models in Hugging Face format, with a word tokenizer, that transformers and vLLM
read."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_opd.contracts.rows import Row, Task

VOCAB_SIZE = 96  # not a multiple of 64, to which vLLM pads
EOS_ID = 1
SPECIAL_IDS = (0, EOS_ID)
MAX_POSITIONS = 512
# Heads of 32: vLLM's attention on the host wants at least that. Qwen2's heads are hidden_size /
# heads wide.
HEADS: dict[str, dict[str, Any]] = {
    "qwen2": {"num_attention_heads": 2, "num_key_value_heads": 1},
    "qwen3": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
    "qwen3_moe": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
    "llama": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
    "mistral": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "sliding_window": None,
    },
}


def build(
    model_type: str, seed: int, *, tied: bool = False, rope: dict | None = None, **sizes: int
) -> transformers.PreTrainedModel:
    """A float32 model whose distributions are far from uniform.

    `rope`: what its RoPE scaling says beside the base. `sizes`: other keys of its config.
    """
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(
        model_type,
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        **HEADS[model_type],
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=tied,
        eos_token_id=EOS_ID,
        bos_token_id=None,
        pad_token_id=0,
        initializer_range=0.15,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0} | (rope or {}),
        **sizes,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        # transformers initialises them to zero, which would hide a bias that is not loaded
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def write(model: transformers.PreTrainedModel, directory: Path) -> Path:
    model.save_pretrained(directory)
    words = {"<pad>": 0, "<eos>": EOS_ID} | {f"w{i}": i for i in range(2, VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(directory)
    return directory


def set_ends(directory: Path, ids: list[int]) -> None:
    """What the generation config says beside the tokenizer's EOS."""
    path = directory / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": ids}))


def tensors(model: transformers.PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hugging Face name, tensor), tied weights once."""
    return iter(list(model.named_parameters()))


def tasks(*lengths: int) -> list[Task]:
    """Random prompts of the given lengths; all share their first tokens."""
    token_ids = np.random.default_rng(7).integers(2, VOCAB_SIZE, max(lengths)).astype(np.int32)
    return [
        Task(
            index=index,
            problem="",
            answer="",
            text="",
            prompt_ids=np.append(token_ids[: n - 1], np.int32(2 + index)),
        )
        for index, n in enumerate(lengths)
    ]


@torch.no_grad()
def logprobs(
    model: transformers.PreTrainedModel, row: Row, temperature: float, top_p: float
) -> np.ndarray:
    """transformers' logprobs of the completion's tokens under temperature and nucleus sampling."""
    token_ids = torch.from_numpy(np.concatenate([row.prompt_ids, row.token_ids]).astype(np.int64))
    logits_TV = model(token_ids[None]).logits[0, len(row.prompt_ids) - 1 : -1] / temperature
    probabilities_TV, order_TV = logits_TV.softmax(-1).sort(descending=True)
    outside_TV = probabilities_TV.cumsum(-1) - probabilities_TV >= top_p
    logits_TV = logits_TV.masked_fill(outside_TV.scatter(-1, order_TV, outside_TV), -torch.inf)
    return logits_TV.log_softmax(-1).gather(-1, token_ids[-row.num_tokens :, None])[:, 0].numpy()
