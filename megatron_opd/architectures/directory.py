"""The vocabulary of a model directory, and whether two directories share one.

Imports no torch.
"""

from pathlib import Path

from megatron_opd.errors import DataError
from megatron_opd.files.json_file import read_json


def holds_megatron_weights(model_dir: Path) -> bool:
    """True when the weights are a Megatron distributed checkpoint, written by `convert`."""
    return (model_dir / "model" / ".metadata").is_file()


def read_vocabulary(model_dir: Path) -> dict[str, int]:
    """Token -> id, added tokens included, from `tokenizer.json`. Raises DataError."""
    path = model_dir / "tokenizer.json"
    if not path.is_file():
        raise DataError(f"{path}: missing; save the model's fast tokenizer there")
    tokenizer = read_json(path)
    try:
        vocabulary = tokenizer.get("model", {}).get("vocab", {})
        if isinstance(vocabulary, list):  # Unigram: [token, score] in the order of ids
            vocabulary = {token: index for index, (token, _) in enumerate(vocabulary)}
        vocabulary = vocabulary | {
            token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])
        }
    except (TypeError, ValueError, KeyError, AttributeError):
        raise DataError(f"{path}: not a file of the tokenizers library; copy it again") from None
    wrong = next((token for token, index in vocabulary.items() if type(index) is not int), None)
    if wrong is not None:
        raise DataError(
            f"{path}: the id of token {wrong!r} is {vocabulary[wrong]!r}, not a number; copy the "
            "file again"
        )
    return vocabulary


def check_vocabulary(model_dir: Path, vocab_size: int) -> None:
    """Raises DataError when the tokenizer has no tokens, or ids that the embedding lacks."""
    highest = max(read_vocabulary(model_dir).values(), default=-1)
    if not 0 <= highest < vocab_size:
        problem = (
            f"its highest token id is {highest}, outside vocab_size={vocab_size} of config.json"
        )
        raise DataError(f"{model_dir / 'tokenizer.json'}: {problem}; it belongs to another model")


def common_vocabulary(student_dir: Path, teacher_dir: Path) -> int | None:
    """The number of ids, from 0 on, of the same token for both; None for equal vocabularies.

    One of them may have further tokens after the common ones, as Qwen3 has after Qwen2.5's. Sizes
    of embeddings may differ. Raises DataError with the first id at which the vocabularies differ.
    """
    if student_dir.resolve() == teacher_dir.resolve():
        return None
    student = read_vocabulary(student_dir)
    teacher = read_vocabulary(teacher_dir)
    if student == teacher:
        return None
    student_tokens = {index: token for token, index in student.items()}
    teacher_tokens = {index: token for token, index in teacher.items()}
    size = min(max(student_tokens, default=-1), max(teacher_tokens, default=-1)) + 1
    differing = (i for i in range(size) if student_tokens.get(i) != teacher_tokens.get(i))
    first = next(differing, None)
    shared_ids = len(student_tokens) < len(student) or len(teacher_tokens) < len(teacher)
    if first is None and not shared_ids:
        return size
    if first is None:  # two tokens have the same id
        token = min(student.items() ^ teacher.items())[0]
        difference = (
            f"token {token!r} has id {student.get(token)} there and {teacher.get(token)} here"
        )
    else:
        there = _token(student_tokens.get(first))
        here = _token(teacher_tokens.get(first))
        difference = f"id {first} is {there} there and {here} here"
    raise DataError(
        f"{teacher_dir / 'tokenizer.json'}: not the tokenizer of {student_dir}: {difference}; "
        "teacher and student must share one"
    )


def _token(token: str | None) -> str:
    return "no token" if token is None else repr(token)
