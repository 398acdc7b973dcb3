"""The tokenizer of a model directory. Imports transformers only when called."""

from pathlib import Path
from typing import Any

from megatron_opd.architectures.ends import Ends, read_ends
from megatron_opd.errors import DataError, first_line
from megatron_opd.tasks.light_tokenizer import read_light_tokenizer

Tokenizer = Any  # transformers.PreTrainedTokenizerBase, which would be a slow import


def load_tokenizer(model_dir: str | Path) -> Tokenizer:
    """The tokenizer of a directory, from local files; no code from the directory is run.

    Raises DataError, naming the directory, when it is missing or holds no usable tokenizer.
    """
    if not Path(model_dir).is_dir():
        raise DataError(
            f"{model_dir}: no such model directory; it must hold config.json, weights and "
            "tokenizer files"
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(model_dir), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # OSError, ValueError, KeyError ... by kind of damage
        cause = first_line(error)
        raise DataError(
            f"{model_dir}: cannot load a tokenizer ({cause}); copy tokenizer.json and "
            "tokenizer_config.json there"
        ) from error
    # Of some models' class transformers makes an empty tokenizer where there is none.
    files = tokenizer.vocab_files_names.values()
    if files and not any((Path(model_dir) / name).is_file() for name in files):
        raise DataError(
            f"{model_dir}: holds no tokenizer; copy tokenizer.json and tokenizer_config.json there"
        )
    return tokenizer


def ends_of(tokenizer: Tokenizer) -> Ends:
    """The tokens that end a completion of the tokenizer's model. Raises DataError for none."""
    if tokenizer.name_or_path and (Path(tokenizer.name_or_path) / "tokenizer.json").is_file():
        return read_ends(tokenizer.name_or_path)
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"{tokenizer.name_or_path}: the tokenizer has no EOS token; set eos_token in its config"
        )
    return Ends((int(tokenizer.eos_token_id),), int(tokenizer.eos_token_id))


def tokenizer_for_checks(model_dir: str | Path) -> Tokenizer:
    """A tokenizer with the results of `load_tokenizer`'s, if possible without transformers.

    Raises DataError as `load_tokenizer` does.
    """
    return read_light_tokenizer(Path(model_dir)) or load_tokenizer(model_dir)
