"""A tokenizer for checks, without transformers, whose import takes seconds: the tokenizers library
on `tokenizer.json`.

transformers 5 changes a tokenizer while it loads it: some classes build the splitting of text anew,
some settings add tokens. `read_light_tokenizer` therefore answers only for directories in which
none of that can make a difference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from megatron_opd.files.json_file import read_json

_NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_MUST_BE_OFF = (
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "split_special_tokens",
    "model_specific_special_tokens",
)
# Further settings that change nothing, or that are looked at below.
_SETTINGS = {
    *_NAMED,
    *_LISTS,
    *_MUST_BE_OFF,
    "added_tokens_decoder",
    "clean_up_tokenization_spaces",
    "chat_template",
    "tokenizer_class",
    "backend",
    "model_max_length",
    "max_length",
    "errors",
    "legacy",
    "is_local",
    "local_files_only",
    "name_or_path",
    "padding_side",
    "truncation_side",
    "model_input_names",
    "pad_token_type_id",
    "pad_to_multiple_of",
    "stride",
    "truncation_strategy",
    "use_default_system_prompt",
    "tokenizer_file",
}
# Classes that take tokenizer.json as it is. That of Qwen2, and whatever a Qwen2 model names, builds
# its own.
_AS_STORED = ("PreTrainedTokenizerFast", "TokenizersBackend")
_QWEN2 = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
_QWEN2_DEFAULTS = dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>")
_QWEN2_SPLIT = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",  # English contractions
        r"[^\r\n\p{L}\p{N}]?\p{L}+",  # a word, with the space or mark before it
        r"\p{N}",  # digits one by one
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # punctuation, with the line breaks behind it
        r"\s*[\r\n]+",  # line breaks, with the white space before them
        r"\s+(?!\S)",  # white space but for its last character, which the next word takes
        r"\s+",
    )
)
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class LightTokenizer:
    """The part of a transformers tokenizer that rendering and tokenising prompts needs."""

    name_or_path: str
    chat_template: str | dict[str, str] | None
    special_tokens_map: dict[str, str]
    backend: Tokenizer

    @property
    def eos_token_id(self) -> int | None:
        eos = self.special_tokens_map.get("eos_token")
        return None if eos is None else self.backend.token_to_id(eos)

    def __len__(self) -> int:
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    def __call__(
        self, texts: list[str], *, add_special_tokens: bool, **_: object
    ) -> dict[str, list[list[int]]]:
        encodings = self.backend.encode_batch(texts, add_special_tokens=add_special_tokens)
        return {"input_ids": [encoding.ids for encoding in encodings]}

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return str(self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens))


def read_light_tokenizer(model_dir: Path) -> LightTokenizer | None:
    """The tokenizer of a model directory, or None where transformers could differ or has to say
    what is wrong."""
    try:
        stored = read_json(model_dir / "tokenizer.json")
        settings = read_json(model_dir / "tokenizer_config.json")
        config = read_json(model_dir / "config.json")
        qwen2 = _is_qwen2(settings["tokenizer_class"], config["model_type"])
        if qwen2 is None or not _settings_are_known(model_dir, stored, settings):
            return None
        defaults = _QWEN2_DEFAULTS if qwen2 else {}
        given = defaults | {key: _content(settings[key]) for key in _NAMED if key in settings}
        named = {key: given[key] for key in _NAMED if given.get(key) is not None}
        if not _tokens_are_stored(model_dir, stored, settings, named) or (
            qwen2 and not _is_qwen2_s(stored)
        ):
            return None
        backend = _open(model_dir, stored, settings)
        return LightTokenizer(str(model_dir), _chat_template(model_dir, settings), named, backend)
    except (
        Exception
    ):  # of files that are no tokenizer's: transformers can read them, or says what is wrong
        return None


def _is_qwen2(kind: str, model_type: str) -> bool | None:
    """Whether transformers takes its class for Qwen2; None where it takes one that is not known
    here."""
    if kind in _QWEN2 or (model_type == "qwen2" and kind):
        return True
    return False if kind in _AS_STORED else None


def _settings_are_known(
    model_dir: Path, stored: Mapping[str, Any], settings: Mapping[str, Any]
) -> bool:
    return (
        set(settings) <= _SETTINGS
        and not any(settings.get(key) for key in _MUST_BE_OFF)
        and not any(isinstance(settings.get(key), dict) for key in _LISTS)
        and (stored["model"]["type"] == "BPE" or not settings.get("clean_up_tokenization_spaces"))
        and not (model_dir / "additional_chat_templates").exists()
    )


def _tokens_are_stored(
    model_dir: Path,
    stored: Mapping[str, Any],
    settings: Mapping[str, Any],
    named: Mapping[str, str],
) -> bool:
    """Whether every special token is one of tokenizer.json's already, so that loading adds and
    changes none."""
    added = {token["content"]: token for token in stored["added_tokens"]}
    extra = [_content(token) for key in _LISTS for token in settings.get(key) or ()]
    plain = {flag: flag == "special" for flag in _FLAGS}
    if any(
        token not in added or _flags(added[token]) != plain for token in (*named.values(), *extra)
    ):
        return False
    if "added_tokens_decoder" in settings:
        decoder = {int(index): token for index, token in settings["added_tokens_decoder"].items()}
        return {token["id"]: (token["content"], _flags(token)) for token in added.values()} == {
            index: (token["content"], _flags(token)) for index, token in decoder.items()
        }
    if (model_dir / "added_tokens.json").exists():
        return False
    legacy = model_dir / "special_tokens_map.json"
    given = read_json(legacy) if legacy.exists() else {}
    return all(_contents(value) == _contents(settings.get(key)) for key, value in given.items())


def _flags(token: Mapping[str, Any]) -> dict[str, bool]:
    return {flag: token[flag] for flag in _FLAGS}


def _content(token: Any) -> Any:
    return token["content"] if isinstance(token, dict) else token


def _contents(tokens: Any) -> Any:
    return [_content(token) for token in tokens] if isinstance(tokens, list) else _content(tokens)


def _is_qwen2_s(stored: Mapping[str, Any]) -> bool:
    """Whether tokenizer.json is what transformers' class for Qwen2 makes of its vocabulary and
    merges."""
    model, vocabulary = stored["model"], stored["model"]["vocab"]
    switches = (
        "dropout",
        "unk_token",
        "continuing_subword_prefix",
        "end_of_word_suffix",
        "fuse_unk",
        "byte_fallback",
        "ignore_merges",
    )
    split, byte_level = stored["pre_tokenizer"]["pretokenizers"]
    new = sorted(
        token["id"] for token in stored["added_tokens"] if token["content"] not in vocabulary
    )
    return (
        model["type"] == "BPE"
        and not any(model.get(switch) for switch in switches)
        and stored["normalizer"] == {"type": "NFC"}
        and (split["type"], split["behavior"], split["invert"]) == ("Split", "Isolated", False)
        and split["pattern"] == {"Regex": _QWEN2_SPLIT}
        and byte_level["type"] == stored["decoder"]["type"] == "ByteLevel"
        and not byte_level["add_prefix_space"]
        and not byte_level["use_regex"]
        and new == list(range(len(vocabulary), len(vocabulary) + len(new)))
    )


def _chat_template(model_dir: Path, settings: Mapping[str, Any]) -> str | dict[str, str] | None:
    file = model_dir / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    return (
        {each["name"]: each["template"] for each in template}
        if isinstance(template, list)
        else template
    )


def _open(model_dir: Path, stored: Mapping[str, Any], settings: Mapping[str, Any]) -> Tokenizer:
    backend = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    backend.no_truncation()
    backend.no_padding()
    if (
        stored["post_processor"] is None
        or "add_bos_token" in settings
        or "add_eos_token" in settings
    ):
        backend.post_processor = TemplateProcessing(
            single="$A:0", pair="$A:0 $B:1", special_tokens=[]
        )
    return backend
