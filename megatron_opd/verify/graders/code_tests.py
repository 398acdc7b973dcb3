"""A problem's tests, as LiveCodeBench publishes them.

A test is an object of `input`, `output` and `testtype`. The public ones are a list in JSON. The
private ones are too, or base64 of zlib of a pickle of a JSON text. That pickle is one string, which
is read without unpickling.
"""

import base64
import binascii
import json
import pickletools
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

MOST_BYTES = 2**30  # of a problem's private tests; those of the largest problems are 100 MB

# All that the pickle of a string is made of.
_OF_TEXT = ("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_AROUND_IT = ("PROTO", "FRAME", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "STOP")


class BadTests(Exception):
    """A problem has no tests that can be run; the message says why."""


@dataclass(frozen=True)
class CodeTests:
    """The tests of a problem, the public ones first."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    function: str  # that is called; "" for a program that reads stdin


def read_tests(details: Mapping[str, object]) -> CodeTests:
    """The tests in a question's `public_test_cases`, `private_test_cases` and `metadata`.

    Raises BadTests, also where there is none: an answer without tests must not pass.
    """
    public = _list(_parsed(details, "public_test_cases"), "public_test_cases")
    tests = [*public, *_list(_private(details), "private_test_cases")]
    if not tests:
        raise BadTests("there are no tests")
    kinds = {str(test.get("testtype", "")) for test in tests}
    function = _function(details)
    if kinds != ({"functional"} if function else {"stdin"}):
        raise BadTests(f"testtype {' and '.join(sorted(kinds))} with the function {function!r}")
    return CodeTests(
        tuple(_text(test, "input") for test in tests),
        tuple(_text(test, "output") for test in tests),
        function,
    )


def text_of_pickle(data: bytes) -> str:
    """The one string that a pickle holds. Raises BadTests for any other pickle.

    No instruction of the pickle is carried out.
    """
    texts = []
    try:
        for operation, argument, _ in pickletools.genops(data):
            if operation.name in _OF_TEXT:
                texts.append(str(argument))
            elif operation.name not in _AROUND_IT:
                raise BadTests(f"a pickle with {operation.name}, which is not one text")
    except ValueError as error:
        raise BadTests(f"a damaged pickle: {error}") from None
    if len(texts) != 1:
        raise BadTests(f"a pickle of {len(texts)} texts")
    return texts[0]


def _private(details: Mapping[str, object]) -> object:
    written = details.get("private_test_cases", "")
    if not isinstance(written, str) or written.lstrip().startswith("[") or not written:
        return _parsed(details, "private_test_cases")
    try:
        packed = base64.b64decode(written, validate=True)
        unpacking = zlib.decompressobj()
        data = unpacking.decompress(packed, MOST_BYTES)
    except (binascii.Error, ValueError, zlib.error) as error:
        raise BadTests(f"private_test_cases: {error}") from None
    if not unpacking.eof:
        size = len(data)
        what = f"more than {size} bytes" if size == MOST_BYTES else "cut off"
        raise BadTests(f"private_test_cases: {what}")
    return _json(text_of_pickle(data), "private_test_cases")


def _function(details: Mapping[str, object]) -> str:
    metadata = _parsed(details, "metadata") or {}
    if not isinstance(metadata, Mapping):
        raise BadTests("metadata is not an object")
    name = metadata.get("func_name") or ""
    if not isinstance(name, str) or (name and not name.isidentifier()):
        raise BadTests(f"metadata: func_name {name!r} is no name")
    return name


def _parsed(details: Mapping[str, object], column: str) -> object:
    """A column's value; a text is JSON, and "" nothing."""
    value = details.get(column, "")
    return _json(value, column) if isinstance(value, str) else value


def _json(text: str, column: str) -> object:
    try:
        return json.loads(text) if text.strip() else None
    except (ValueError, RecursionError) as error:
        raise BadTests(f"{column}: {error}") from None


def _list(value: object, column: str) -> list[Mapping[str, object]]:
    tests = [] if value is None else value
    if not isinstance(tests, list) or not all(isinstance(test, Mapping) for test in tests):
        raise BadTests(f"{column} is not a list of objects")
    return tests


def _text(test: Mapping[str, object], name: str) -> str:
    value = test.get(name)
    if not isinstance(value, str):
        raise BadTests(f"a test without the text {name!r}")
    return value
