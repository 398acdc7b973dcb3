"""JSON files of a model directory, and values of the types they must have. Imports no torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Le

from megatron_opd.errors import DataError
from megatron_opd.files.typed import InvalidKey, build

Size = Annotated[int, Ge(1), Le(2**31 - 1)]
_REQUIRED = object()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises FileNotFoundError where there is no file, DataError naming it for anything else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); make it a readable file"
        ) from None
    # a wrong encoding and a number with too many digits are ValueErrors too
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); copy it again") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: must be a JSON object, not {_kind_of(value)}; copy it again")
    return value


def read_key(
    values: Mapping[str, Any], key: str, kind: Any, path: Path, default: Any = _REQUIRED
) -> Any:
    """The value of `key`, of the type `kind`; `path` is the file it comes from.

    Raises DataError naming file and key when the value is of another type, or is missing and has no
    default.
    """
    if key not in values:
        if default is _REQUIRED:
            raise DataError(f"{path}: key {key!r} is missing")
        return default
    try:
        return build(kind, values[key], key)
    except InvalidKey as error:
        raise DataError(f"{path}: {error.path}: {error.problem}; correct it there") from None


def _kind_of(value: object) -> str:
    names = {list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")
