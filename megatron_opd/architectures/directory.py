"""What lies beside the weights in a model directory, and whether two of them share a tokenizer.
Imports no torch."""

from pathlib import Path

from megatron_opd.errors import DataError
from megatron_opd.files.json_file import read_json


def holds_megatron_weights(model_dir: Path) -> bool:
    """Whether the weights are a Megatron distributed checkpoint, as `convert` writes, and not
    safetensors."""
    return (model_dir / "model" / ".metadata").is_file()


def read_vocabulary(model_dir: Path) -> dict[str, int]:
    """Token -> id from `tokenizer.json`, added tokens included. Raises DataError naming the
    file."""
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
    """Raises DataError when the tokenizer has ids that the model's embedding lacks, or no
    tokens."""
    highest = max(read_vocabulary(model_dir).values(), default=-1)
    if not 0 <= highest < vocab_size:
        problem = (
            f"its highest token id is {highest}, outside vocab_size={vocab_size} of config.json"
        )
        raise DataError(f"{model_dir / 'tokenizer.json'}: {problem}; it belongs to another model")


def common_vocabulary(student_dir: Path, teacher_dir: Path) -> int | None:
    """How many of the first ids mean the same token to both; None where both have one vocabulary.

    One of them may have further tokens after the last common one, as Qwen3 has after those of
    Qwen2.5. Raises DataError with the first id at which they differ. Sizes of embeddings may
    differ.
    """
    if student_dir.resolve() == teacher_dir.resolve():
        return None
    student, teacher = read_vocabulary(student_dir), read_vocabulary(teacher_dir)
    if student == teacher:
        return None
    mine, theirs = ({index: token for token, index in each.items()} for each in (student, teacher))
    size = min(max(mine, default=-1), max(theirs, default=-1)) + 1
    first = next((index for index in range(size) if mine.get(index) != theirs.get(index)), None)
    twice = len(mine) < len(student) or len(theirs) < len(teacher)
    if first is None and not twice:
        return size
    if first is None:  # two tokens of one id
        token = min(student.items() ^ teacher.items())[0]
        difference = (
            f"token {token!r} has id {student.get(token)} there and {teacher.get(token)} here"
        )
    else:
        difference = (
            f"id {first} is {_token(mine.get(first))} there and {_token(theirs.get(first))} here"
        )
    raise DataError(
        f"{teacher_dir / 'tokenizer.json'}: not the tokenizer of {student_dir}: {difference}; "
        "teacher and student must share one"
    )


def _token(token: str | None) -> str:
    return "no token" if token is None else repr(token)
