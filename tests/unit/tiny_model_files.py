"""Model directories and recipes small enough to write per test: real configs, tokenizers and
headers of weights."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_opd.architectures.architecture import read_architecture
from megatron_opd.weights.table import hf_shapes, weight_table

TOKENS = ["<eos>", "<unk>", *"0123456789+= "]


def write_zeros(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16", itemsize: int = 2
) -> None:
    """A safetensors file that takes no room on the disk, whatever its size: a header, and a
    hole."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + itemsize * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def write_model(directory: Path, *, tokens: list[str] | None = None, **changes: Any) -> Path:
    """A Qwen3 directory as far as checks read it: 4 heads, 2 key-value heads, 4 layers, 64
    positions."""
    directory.mkdir(parents=True)
    config = {
        "model_type": "qwen3",
        "vocab_size": 16,
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
    }
    (directory / "config.json").write_text(json.dumps(config | changes))
    write_zeros(
        directory / "model.safetensors", hf_shapes(weight_table(read_architecture(directory)))
    )
    vocabulary = {token: index for index, token in enumerate(tokens or TOKENS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(["<eos>", "<unk>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def write_recipe(folder: Path, **changes: Any) -> Path:
    """A TGPO recipe that passes every check, with its models and data, all below `folder`."""
    for name in ("student", "teacher"):
        if not (folder / name).exists():
            write_model(folder / name)
    data = folder / "train.jsonl"
    data.write_text(
        "".join(json.dumps({"problem": f"{i}+1=", "answer": str(i + 1)}) + "\n" for i in range(8))
    )
    recipe = {
        "name": "tiny",
        "num_steps": 4,
        "max_sequence_length": 32,
        "student": {"path": str(folder / "student")},
        "teacher": {"path": str(folder / "teacher")},
        "method": "tgpo",
        "data": {"train": str(data), "template": {"kind": "raw"}},
        "rollout": {"num_prompts": 4, "samples_per_prompt": 2, "max_completion_tokens": 8},
        "train": {"optimizer": {"lr": 1e-3}},
        "run_dir": str(folder / "run"),
    }
    path = folder / "tiny.yaml"
    with path.open("w") as file:
        file.write("# A recipe of the tests.\n")
        YAML(typ="safe", pure=True).dump(recipe | changes, file)
    return path
