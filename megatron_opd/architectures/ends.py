"""Which tokens end a response: of one model directory, and of a teacher's beside a student's.
Imports no torch."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opd.architectures.directory import common_vocabulary, read_vocabulary
from megatron_opd.contracts.merged_ids import MergedIds
from megatron_opd.errors import DataError
from megatron_opd.files.json_file import read_json, read_key


@dataclass(frozen=True)
class Ends:
    """The tokens that end a response. The engine stops at each of them; traces end with `first`."""

    ids: tuple[int, ...]  # ascending
    first: int  # the tokenizer's EOS, or where it names none the generation config's first


def read_ends(model_dir: str | Path) -> Ends:
    """The tokenizer's EOS, and what generation_config.json names (config.json, where that names
    none).

    Ids for which the model has no row are left out: it never samples them.
    Raises DataError when there is none at all: such a model would never stop.
    """
    every = named_ends(model_dir)
    if not every:
        raise DataError(
            f"{model_dir}: names no token that ends a response; set eos_token in "
            "tokenizer_config.json or eos_token_id in generation_config.json"
        )
    return Ends(tuple(sorted(set(every))), every[0])


def named_ends(model_dir: str | Path) -> list[int]:
    """The ids of `read_ends`, its first one first; none where the files name none."""
    of_tokenizer, configured = _of_tokenizer(Path(model_dir)), _configured(Path(model_dir))
    path = Path(model_dir) / "config.json"
    rows = read_key(_read(path), "vocab_size", int | None, path, None) or math.inf
    every = [index for index in (of_tokenizer, *configured) if index is not None and index < rows]
    return list(dict.fromkeys(every))


def merged_ends(student_dir: str | Path, teacher_dir: str | Path) -> MergedIds | None:
    """The ends that the teacher has and the student lacks, and the student's end that stands for
    them.

    None where the teacher ends with tokens that end the student's responses too, or where no end of
    the student's is a token of the teacher's.
    """
    student_dir, teacher_dir = Path(student_dir), Path(teacher_dir)
    student = named_ends(student_dir)
    alone = tuple(sorted(index for index in named_ends(teacher_dir) if index not in student))
    if not alone:
        return None
    common = common_vocabulary(student_dir, teacher_dir)
    known = [index for index in student if common is None or index < common]
    return MergedIds(alone, known[0]) if known else None


def student_ends_note(student_dir: str | Path) -> list[str]:
    """One line where the student's files name different ends."""
    directory = Path(student_dir)
    of_tokenizer, configured = _of_tokenizer(directory), _configured(directory)
    if of_tokenizer is None or not configured or of_tokenizer in configured:
        return []
    tokenizer, others = _names(directory, [of_tokenizer]), _names(directory, configured)
    return [
        f"student.path: ends a response with {tokenizer} by its tokenizer and with {others} by its "
        "generation config; sampling stops at all of them, and so does what is exported"
    ]


def teacher_ends_note(student_dir: str | Path, teacher_dir: str | Path) -> list[str]:
    """One line where the teacher has ends that the student lacks."""
    student, teacher = read_ends(student_dir), read_ends(teacher_dir)
    alone = [index for index in teacher.ids if index not in student.ids]
    if not alone:
        return []
    theirs, mine = _names(Path(teacher_dir), alone), _names(Path(student_dir), list(student.ids))
    merged = merged_ends(student_dir, teacher_dir)
    if merged is None:
        return [
            f"teacher.path: ends a response with {theirs}, the student with {mine}, no token of "
            "the teacher's: there it teaches what the student must not learn; give the terms that "
            "read it a gate {kind: not_end}"
        ]
    into = _names(Path(student_dir), [merged.into])
    return [
        f"teacher.path: ends a response with {theirs}, the student with {mine}; as the teacher's "
        f"tokens the former count as {into}"
    ]


def _of_tokenizer(model_dir: Path) -> int | None:
    """The id of the tokenizer's EOS."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        settings = _read(model_dir / name)
        token = settings.get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if not isinstance(token, str):
            continue
        added = settings.get("added_tokens_decoder", {})
        added = added if isinstance(added, dict) else {}
        known = {
            each.get("content"): index for index, each in added.items() if isinstance(each, dict)
        }
        index = known[token] if token in known else read_vocabulary(model_dir).get(token)
        return None if index is None else int(index)
    return None


def _configured(model_dir: Path) -> list[int]:
    """The ids of the generation config, in its order. Raises DataError naming the key of one that
    is no id."""
    for name in ("generation_config.json", "config.json"):
        path = model_dir / name
        value = read_key(_read(path), "eos_token_id", int | None | list[int], path, None)
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if any(index < 0 for index in ids):
            raise DataError(
                f"{path}: eos_token_id: must be a token's id or a list of them, got {value!r}"
            )
        return list(dict.fromkeys(ids))
    return []


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _names(model_dir: Path, ids: list[int]) -> str:
    """'<|im_end|>' (151645) and ..."""
    token_of = {index: token for token, index in read_vocabulary(model_dir).items()}
    return " and ".join(
        f"{token_of[index]!r} ({index})" if index in token_of else f"{index}" for index in ids
    )
