"""The tokens that end a completion of a model, and a teacher's that differ from a student's.

Imports no torch.
"""

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
    """The tokens that end a response: the engine stops at any of them, traces end with `first`."""

    ids: tuple[int, ...]  # ascending
    first: int  # the tokenizer's EOS, or where it names none the generation config's first


def read_ends(model_dir: str | Path) -> Ends:
    """The tokenizer's EOS and the ends that generation_config.json names.

    Where that file names none, config.json counts. Ids for which the model has no row are left
    out: it never samples them. Raises DataError when no id is left: the model would never stop.
    """
    ids = named_ends(model_dir)
    if not ids:
        raise DataError(
            f"{model_dir}: names no token that ends a response; set eos_token in "
            "tokenizer_config.json or eos_token_id in generation_config.json"
        )
    return Ends(tuple(sorted(set(ids))), ids[0])


def named_ends(model_dir: str | Path) -> list[int]:
    """The ids of `read_ends`, in the order of the files; empty where the files name none."""
    of_tokenizer = _of_tokenizer(Path(model_dir))
    configured = _configured(Path(model_dir))
    path = Path(model_dir) / "config.json"
    rows = read_key(_read(path), "vocab_size", int | None, path, None) or math.inf
    ids = [index for index in (of_tokenizer, *configured) if index is not None and index < rows]
    return list(dict.fromkeys(ids))


def merged_ends(student_dir: str | Path, teacher_dir: str | Path) -> MergedIds | None:
    """The teacher's ends that the student lacks, with the student's end that stands for them.

    None where all of the teacher's ends are the student's too, or where no end of the student's is
    a token of the teacher's.
    """
    student_dir = Path(student_dir)
    teacher_dir = Path(teacher_dir)
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
    of_tokenizer = _of_tokenizer(directory)
    configured = _configured(directory)
    if of_tokenizer is None or not configured or of_tokenizer in configured:
        return []
    tokenizer = _names(directory, [of_tokenizer])
    others = _names(directory, configured)
    return [
        f"student.path: ends a response with {tokenizer} by its tokenizer and with {others} by its "
        "generation config; sampling stops at all of them, and so does what is exported"
    ]


def teacher_ends_note(student_dir: str | Path, teacher_dir: str | Path) -> list[str]:
    """One line where the teacher has ends that the student lacks."""
    student = read_ends(student_dir)
    teacher = read_ends(teacher_dir)
    alone = [index for index in teacher.ids if index not in student.ids]
    if not alone:
        return []
    teacher_ends = _names(Path(teacher_dir), alone)
    student_ends = _names(Path(student_dir), list(student.ids))
    merged = merged_ends(student_dir, teacher_dir)
    if merged is None:
        return [
            f"teacher.path: ends a response with {teacher_ends}, the student with {student_ends}, "
            "no token of the teacher's: there it teaches what the student must not learn; give the "
            "terms that read it a gate {kind: not_end}"
        ]
    into = _names(Path(student_dir), [merged.into])
    return [
        f"teacher.path: ends a response with {teacher_ends}, the student with {student_ends}; as "
        f"the teacher's tokens the former count as {into}"
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
            entry.get("content"): index for index, entry in added.items() if isinstance(entry, dict)
        }
        index = known[token] if token in known else read_vocabulary(model_dir).get(token)
        return None if index is None else int(index)
    return None


def _configured(model_dir: Path) -> list[int]:
    """The ids that the generation config names, in its order. Raises DataError for no id."""
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
    """The tokens and their ids, such as "'<|im_end|>' (151645)", joined with "and"."""
    token_of = {index: token for token, index in read_vocabulary(model_dir).items()}
    return " and ".join(
        f"{token_of[index]!r} ({index})" if index in token_of else f"{index}" for index in ids
    )
