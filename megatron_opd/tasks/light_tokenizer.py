"""A tokenizer for checks: the tokenizers library on `tokenizer.json`, without transformers.

transformers takes seconds to import, and its version 5 changes a tokenizer while it loads it: some
classes build the splitting of text anew, some settings add tokens. `read_light_tokenizer` therefore
answers only for directories in which none of that can make a difference.
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
# Settings that change nothing, or that are looked at below.
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
# Classes that take tokenizer.json as it is. The class of Qwen2, and any class that a Qwen2 model
# names, builds its own.
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
    """The attributes of a transformers tokenizer that rendering and tokenising prompts needs."""

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
    """The tokenizer of a model directory.

    None when transformers could differ, or has to report an error.
    """
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
        if not _tokens_are_stored(model_dir, stored, settings, named):
            return None
        if qwen2 and not _is_qwen2_s(stored):
            return None
        backend = _open(model_dir, stored, settings)
        return LightTokenizer(str(model_dir), _chat_template(model_dir, settings), named, backend)
    except Exception:  # files of another kind: transformers can read them, or reports the error
        return None


def _is_qwen2(kind: str, model_type: str) -> bool | None:
    """True if transformers takes its class for Qwen2; None for a class that is not known here."""
    if model_type == "mistral":  # transformers mends some tokenizers of this family
        return None
    if kind in _QWEN2 or (model_type == "qwen2" and kind):
        return True
    return False if kind in _AS_STORED else None


def _settings_are_known(
    model_dir: Path, stored: Mapping[str, Any], settings: Mapping[str, Any]
) -> bool:
    """True if no setting makes transformers change the tokenizer."""
    if not set(settings) <= _SETTINGS or any(settings.get(key) for key in _MUST_BE_OFF):
        return False
    if any(isinstance(settings.get(key), dict) for key in _LISTS):
        return False
    if stored["model"]["type"] != "BPE" and settings.get("clean_up_tokenization_spaces"):
        return False
    return not (model_dir / "additional_chat_templates").exists()


def _tokens_are_stored(
    model_dir: Path,
    stored: Mapping[str, Any],
    settings: Mapping[str, Any],
    named: Mapping[str, str],
) -> bool:
    """True if tokenizer.json has every special token, so that loading adds and changes none."""
    added = {token["content"]: token for token in stored["added_tokens"]}
    extra = [_content(token) for key in _LISTS for token in settings.get(key) or ()]
    plain = {flag: flag == "special" for flag in _FLAGS}
    for token in (*named.values(), *extra):
        if token not in added or _flags(added[token]) != plain:
            return False
    if "added_tokens_decoder" in settings:
        decoder = {int(index): token for index, token in settings["added_tokens_decoder"].items()}
        by_id = {token["id"]: token for token in added.values()}
        return _flags_by_id(by_id) == _flags_by_id(decoder)
    if (model_dir / "added_tokens.json").exists():
        return False
    legacy = model_dir / "special_tokens_map.json"
    given = read_json(legacy) if legacy.exists() else {}
    return all(_contents(value) == _contents(settings.get(key)) for key, value in given.items())


def _flags_by_id(tokens: Mapping[int, Mapping[str, Any]]) -> dict[int, tuple[Any, dict[str, bool]]]:
    return {index: (token["content"], _flags(token)) for index, token in tokens.items()}


def _flags(token: Mapping[str, Any]) -> dict[str, bool]:
    return {flag: token[flag] for flag in _FLAGS}


def _content(token: Any) -> Any:
    return token["content"] if isinstance(token, dict) else token


def _contents(tokens: Any) -> Any:
    return [_content(token) for token in tokens] if isinstance(tokens, list) else _content(tokens)


def _is_qwen2_s(stored: Mapping[str, Any]) -> bool:
    """True if transformers' class for Qwen2 makes this tokenizer.json of vocabulary and merges."""
    model = stored["model"]
    vocabulary = model["vocab"]
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
    added = [token for token in stored["added_tokens"] if token["content"] not in vocabulary]
    new = sorted(token["id"] for token in added)
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
    if isinstance(template, list):
        return {named["name"]: named["template"] for named in template}
    return template


def _open(model_dir: Path, stored: Mapping[str, Any], settings: Mapping[str, Any]) -> Tokenizer:
    backend = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    backend.no_truncation()
    backend.no_padding()
    adds_none = "add_bos_token" in settings or "add_eos_token" in settings
    if stored["post_processor"] is None or adds_none:
        plain = TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])
        backend.post_processor = plain
    return backend
