"""Turns a mapping into frozen dataclasses; pydantic checks the values at the leaves.

Walking the schema here keeps each error at one key with one sentence, where pydantic lists every
branch of a union.
"""

import difflib
import functools
import inspect
import reprlib
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from megatron_opd.files.own_code import NoOwnCode, load_own

_MOST_LISTED = 60
_LEAF = ConfigDict(strict=True, allow_inf_nan=False)


class InvalidKey(Exception):
    """One wrong key.

    `path` is dotted, "" for the whole recipe; `problem` says what is wrong, and the remedy.
    """

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path
        self.problem = problem


def build(kind: Any, value: Any, path: str = "") -> Any:
    """`value` as an instance of `kind`: dataclass, union, dict or leaf type. Raises InvalidKey."""
    if is_dataclass(kind):
        return _build_dataclass(kind, value, path)
    if get_origin(kind) in (Union, types.UnionType):
        return _build_union(get_args(kind), value, path)
    if get_origin(kind) is dict:
        return {
            str(key): build(get_args(kind)[1], item, join(path, key))
            for key, item in _mapping(value, path)
        }
    return _build_leaf(kind, value, path)


def join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """ "unknown <what>; did you mean ...?", with all names if they are few or none is close.

    Of very many names the first are listed.
    """
    known = list(known)
    close = " or ".join(difflib.get_close_matches(name, known, n=2, cutoff=0.7))
    hint = f"; did you mean {close}?" if close else ";"
    if close and len(known) > 5:
        return f"unknown {what}{hint}"
    listed = ", ".join(known[:_MOST_LISTED])
    more = len(known) - _MOST_LISTED
    return f"unknown {what}{hint} known: {listed}" + (f" and {more} more" if more > 0 else "")


def key_paths(kind: Any, path: str = "") -> list[str]:
    """Dotted paths of every key below `kind`, except inside free-form dicts."""
    if get_origin(kind) in (Union, types.UnionType):
        return [key for member in get_args(kind) for key in key_paths(member, path)]
    if not is_dataclass(kind):
        return [path] if path else []
    paths = [path] if path else []
    for name, hint in _hints(kind).items():
        paths += key_paths(hint, join(path, name))
    return paths


def _build_dataclass(kind: Any, value: Any, path: str) -> Any:
    hints = _hints(kind)
    given = {str(key): item for key, item in _mapping(value, path)}
    for key in given:
        if key not in hints:
            raise InvalidKey(join(path, key), _unknown_key(kind, key, hints))
    for field in fields(kind):
        required = field.default is MISSING and field.default_factory is MISSING
        if required and field.name not in given:
            raise InvalidKey(join(path, field.name), "missing; it has no default")
    return kind(**{key: build(hints[key], item, join(path, key)) for key, item in given.items()})


def _unknown_key(kind: Any, key: str, hints: Mapping[str, Any]) -> str:
    elsewhere = [known for known in key_paths(kind) if known.rpartition(".")[2] == key]
    if elsewhere and not difflib.get_close_matches(key, hints, n=1):
        return f"unknown key; did you mean {elsewhere[0]}?"
    return unknown("key", key, hints)


def _build_union(members: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and type(None) in members:
        return None
    classes = [member for member in members if is_dataclass(member)]
    leaves = tuple(kind for kind in members if not is_dataclass(kind) and kind is not type(None))
    if not isinstance(value, Mapping) and leaves:
        return _build_leaf(Union[leaves], value, path)  # noqa: UP007 (the members are a run-time tuple)
    if len(classes) > 1:
        return _build_dataclass(_tagged(classes, value, path), value, path)
    if classes:
        return _build_dataclass(classes[0], value, path)
    return _build_leaf(Union[leaves], value, path)  # noqa: UP007


def _tagged(classes: list[Any], value: Any, path: str) -> Any:
    by_kind = {tag: cls for cls in classes for tag in get_args(_hints(cls)["kind"])}
    given = dict(_mapping(value, path))
    usual = [cls for cls in classes if cls.__dataclass_fields__["kind"].default is not MISSING]
    if "kind" not in given and usual:
        return usual[0]
    if "kind" not in given:
        raise InvalidKey(join(path, "kind"), f"missing; one of {', '.join(by_kind)}")
    kind = given["kind"]
    if isinstance(kind, str) and ":" in kind and classes[0].__base__ is not object:
        return _own_class(kind, classes, join(path, "kind"))
    if not isinstance(kind, str) or kind not in by_kind:
        raise InvalidKey(
            join(path, "kind"), unknown("kind", kind if isinstance(kind, str) else "", by_kind)
        )
    return by_kind[kind]


def _own_class(reference: str, classes: list[Any], path: str) -> Any:
    """A user's class that "module:Class" names, of the same base class as the union's members."""
    base = classes[0].__base__
    try:
        own = load_own(reference)
    except NoOwnCode as error:
        raise InvalidKey(path, f"{reference!r}: {error}") from None
    if not (isinstance(own, type) and issubclass(own, base) and is_dataclass(own)):
        raise InvalidKey(
            path, f"{reference!r}: must name a dataclass below {base.__module__}.{base.__name__}"
        )
    if inspect.isabstract(own):
        missing = ", ".join(sorted(own.__abstractmethods__))
        raise InvalidKey(path, f"{reference!r}: does not define {missing}")
    return own


def _build_leaf(kind: Any, value: Any, path: str) -> Any:
    try:
        return _adapter(kind).validate_python(_printable(value, path))
    except ValidationError as error:
        problem = (
            error.errors()[0]["msg"]
            .replace("Input should", "must")
            .replace("valid ", "")
            .replace("a int", "an int")
        )
        raise InvalidKey(path, f"{problem.replace('valid ', '')}, got {_shown(value)}") from None


def _printable(value: Any, path: str) -> Any:
    """A text that files and terminals can take; other values as they are."""
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        raise InvalidKey(path, f"must be text without halves of characters, got {_shown(value)}")
    return value


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind, config=_LEAF)


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    return "nothing" if value is None else reprlib.repr(value)


def _mapping(value: Any, path: str) -> Iterable[tuple[Any, Any]]:
    if not isinstance(value, Mapping):
        raise InvalidKey(path, f"must be a mapping of keys, got {_shown(value)}")
    return value.items()


def _hints(kind: Any) -> dict[str, Any]:
    """The types of the keys: of a dataclass's fields, not of its class variables."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in fields(kind)}


def differences(first: Any, second: Any, path: str = "") -> list[str]:
    """Dotted paths of the keys whose values differ between two instances of the schema."""
    if first == second:
        return []
    if is_dataclass(first) and type(first) is type(second):
        names = [field.name for field in fields(first)]
        pairs = {name: (getattr(first, name), getattr(second, name)) for name in names}
    elif isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        pairs = {name: (first[name], second[name]) for name in first}
    else:
        return [path]
    paths = []
    for name, (one, other) in pairs.items():
        paths += differences(one, other, join(path, name))
    return paths
