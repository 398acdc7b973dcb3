"""The tokenizer of checks gives what transformers' gives, for every family, or steps back."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from megatron_opd.tasks.light_tokenizer import read_light_tokenizer
from megatron_opd.tasks.tokenizer import load_tokenizer
from tests.unit.tiny_model_files import write_model, write_recipe

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_SPLIT = QWEN_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
TEXTS = [
    "",
    " ",
    "What is 12 + 34?",
    "  two  blanks , a comma .  ",
    "line\nbreaks\r\n\r\n\tand tabs",
    "caf\u00e9 cafe\u0301",
    "\U0001f9ee emoji \u200d\U0001f468\u200d\U0001f4bb",
    "don't we'll I'VE",
    "$\\frac{1}{2}$ {x} \\boxed{3}",
    "\u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4 \u0627\u0644\u0639\u0631\u0628",
    "<|im_start|>user<|im_end|>",
    "<|endoftext|>",
    "<think>\nhm</think>",
    "x" * 300,
    "1234567890",
    "\x00\x7f\ufeff",
]
QWEN_ADDED = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA_ADDED = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]


def byte_level(split: str, **model: Any) -> Tokenizer:
    """A BPE of bytes with some merges, and the way of splitting that its family has."""
    tokenizer = Tokenizer(models.BPE(**model))
    split_first = pre_tokenizers.Split(Regex(split), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split_first, pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


def save(directory: Path, tokenizer: Tokenizer, model_type: str, **settings: Any) -> Path:
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "config.json").write_text(
        json.dumps({"model_type": model_type, "transformers_version": "4.43.1"})
    )
    return directory


def qwen(directory: Path, model_type: str = "qwen2", **settings: Any) -> Path:
    """Write a directory like Qwen2.5's and Qwen3's, but for the size."""
    tokenizer = byte_level(QWEN_SPLIT)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens(QWEN_ADDED)
    tokenizer.add_tokens(
        [AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)]
    )
    decoder = {
        str(index): {
            "content": token.content,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token.special,
        }
        for index, token in tokenizer.get_added_tokens_decoder().items()
    }
    usual = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        "bos_token": None,
        "additional_special_tokens": QWEN_ADDED[1:],
        "chat_template": CHATML,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    return save(directory, tokenizer, model_type, **(usual | settings))


def llama3(directory: Path, **settings: Any) -> Path:
    """Write a directory like Llama 3's: a beginning of the text, merges that a whole word does not
    need."""
    tokenizer = byte_level(LLAMA_SPLIT, ignore_merges=True)
    tokenizer.add_special_tokens(LLAMA_ADDED)
    bos = LLAMA_ADDED[0]
    first = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), first])
    usual = {
        "bos_token": bos,
        "eos_token": "<|eot_id|>",
        "clean_up_tokenization_spaces": True,
        "chat_template": "{{ bos_token }}" + CHATML,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 131072,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return save(directory, tokenizer, "llama", **(usual | settings))


def with_template_file(directory: Path) -> Path:
    (qwen(directory) / "chat_template.jinja").write_text(
        "{{ messages[0]['content'] }}é" + CHATML, encoding="utf-8"
    )
    return directory


def saved_again(directory: Path) -> Path:
    """Write what transformers 5 writes after it has read a directory."""
    load_tokenizer(qwen(directory.with_name("first"), "qwen3")).save_pretrained(directory)
    (directory / "config.json").write_text('{"model_type": "qwen3"}')
    return directory


def demo(directory: Path) -> Path:
    settings = {
        "backend": "tokenizers",
        "eos_token": "<eos>",
        "pad_token": "<eos>",
        "model_max_length": 64,
    }
    write_model(directory)
    (directory / "tokenizer_config.json").write_text(
        json.dumps(settings | {"tokenizer_class": "TokenizersBackend"})
    )
    return directory


LIGHT: dict[str, Callable[[Path], Path]] = {
    "Qwen2.5": qwen,
    "Qwen2.5 base": lambda d: qwen(d, eos_token="<|endoftext|>"),
    "Qwen3": lambda d: qwen(d, "qwen3"),
    "Qwen3-MoE": lambda d: qwen(d, "qwen3_moe"),
    "Qwen2.5 under the name of another class": lambda d: qwen(
        d, tokenizer_class="LlamaTokenizerFast"
    ),
    "Llama 3": llama3,
    "several templates": lambda d: qwen(
        d,
        chat_template=[
            {"name": "default", "template": CHATML},
            {"name": "tool_use", "template": "x"},
        ],
    ),
    "no template": lambda d: llama3(d, chat_template=None),
    "a template's own file": with_template_file,
    "saved by transformers 5": saved_again,
    "the demo": demo,
}


def deepseek(directory: Path) -> Path:
    """R1-Distill-Qwen: its file splits numbers otherwise than transformers' class for Qwen2
    does."""
    path = qwen(directory, tokenizer_class="LlamaTokenizerFast") / "tokenizer.json"
    stored = json.loads(path.read_text())
    stored["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = LLAMA_SPLIT
    path.write_text(json.dumps(stored))
    return directory


def more_tokens(directory: Path) -> Path:
    path = qwen(directory) / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    token = {flag: False for flag in ("lstrip", "normalized", "rstrip", "single_word", "special")}
    settings["added_tokens_decoder"]["400"] = token | {"content": "<more>"}
    path.write_text(json.dumps(settings))
    return directory


HEAVY: dict[str, Callable[[Path], Path]] = {
    "splits otherwise": deepseek,
    "a token of the settings alone": more_tokens,
    "begins texts": lambda d: llama3(d, add_bos_token=True),
    "a special token that the file lacks": lambda d: qwen(d, eos_token="<|end|>"),
    "another class": lambda d: llama3(d, tokenizer_class="LlamaTokenizer"),
    "a GPT-2 tokenizer": lambda d: llama3(d, tokenizer_class="GPT2Tokenizer"),
    "a setting of tomorrow": lambda d: qwen(d, fold_case=True),
    "splits special tokens": lambda d: qwen(d, split_special_tokens=True),
}


@pytest.mark.parametrize("family", LIGHT)
def test_it_gives_what_transformers_gives(family: str, tmp_path: Path) -> None:
    directory = LIGHT[family](tmp_path / "model")
    light, usual = read_light_tokenizer(directory), load_tokenizer(directory)
    assert light is not None
    assert (len(light), light.eos_token_id) == (len(usual), usual.eos_token_id)
    assert light.special_tokens_map == usual.special_tokens_map
    assert light.chat_template == usual.chat_template
    assert light.name_or_path == usual.name_or_path
    for special in (True, False):
        ids = light(TEXTS, add_special_tokens=special)["input_ids"]
        assert ids == usual(TEXTS, add_special_tokens=special)["input_ids"]
        for each in ids:
            assert light.decode(each) == usual.decode(each)
            assert light.decode(each, skip_special_tokens=True) == usual.decode(
                each, skip_special_tokens=True
            )


@pytest.mark.parametrize("reason", HEAVY)
def test_it_steps_back_where_transformers_may_give_something_else(
    reason: str, tmp_path: Path
) -> None:
    assert read_light_tokenizer(HEAVY[reason](tmp_path / "model")) is None


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("content", [None, "", "[1]", "{}", '{"model": {}, "added_tokens": [{}]}'])
def test_it_steps_back_from_files_that_are_no_tokenizers(
    file: str, content: str | None, tmp_path: Path
) -> None:
    path = qwen(tmp_path / "model") / file
    path.unlink() if content is None else path.write_text(content)
    assert read_light_tokenizer(tmp_path / "model") is None


def test_check_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    code = (
        "import sys; from megatron_opd.cli.main import main; code = main(['check', "
        f"{str(write_recipe(tmp_path))!r}]);sys.exit(str({{'torch', 'transformers', 'pyarrow'}} & "
        "set(sys.modules)) if code == 0 else code)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stderr == "set()\n"
