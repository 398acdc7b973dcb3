"""A model's chat template, rendered as transformers does, but with limits: it is a program of
whoever made the model.

The sandbox keeps it from Python's internals, a time limit ends its loops, and a size limit what it
writes and what its sums, products, powers and joined texts grow to. What a single filter allocates,
such as `center`, has no limit.
"""

import functools
import json
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime, time
from types import FrameType
from typing import Any

from megatron_opd.errors import DataError
from megatron_opd.tasks.messages import Message

MAX_SECONDS = 10.0  # of one prompt; real templates take less than a millisecond
MAX_CHARACTERS = 2**24
_MAX_BITS = 2**16  # of a power
_REMEDY = "set data.template.kind=raw, or mend the template"


@dataclass(frozen=True)
class ChatTemplate:
    """The text of a template, where it comes from, and what it may write: the tokenizer's special
    tokens by name."""

    source: str
    text: str
    special_tokens: Mapping[str, str]

    def render(self, messages: Sequence[Message], day: date) -> str:
        """The prompt text, which ends where the model's answer starts. `day` is what the template
        takes for today.

        Raises DataError when the template fails in any way.
        """
        try:
            with _time_limit(MAX_SECONDS):
                pieces = _compiled(self.text, day).generate(
                    **self.special_tokens,
                    messages=list(messages),
                    tools=None,
                    documents=None,
                    add_generation_prompt=True,
                )
                return _joined(pieces)
        except Exception as error:  # whatever a program of others can raise
            what = " ".join(f"{type(error).__name__}: {error}".split())
            raise DataError(
                f"{self.source}: the chat template fails ({what:.200}); {_REMEDY}"
            ) from error


def only_template(templates: object, source: str) -> str:
    """The template of a tokenizer, which is one text, or several by name with one named `default`.

    Raises DataError where there is none.
    """
    if isinstance(templates, Mapping):
        if "default" not in templates:
            names = ", ".join(str(name) for name in templates)
            raise DataError(
                f"{source}: its chat templates ({names}) have no default; write the one to use "
                f"into {source}/chat_template.jinja"
            )
        templates = templates["default"]
    if not templates:
        raise DataError(f"{source}: the tokenizer has no chat template; set data.template.kind=raw")
    if not isinstance(templates, str):
        raise DataError(
            f"{source}: the chat template is a {type(templates).__name__}, not a text; {_REMEDY}"
        )
    return templates


@functools.lru_cache(maxsize=8)
def _compiled(text: str, day: date) -> Any:
    """The template in transformers' environment: the same settings, filters and functions."""
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.combine(day, time()).strftime(form)

    extensions = [_generation_tag(), loopcontrols]
    environment = _limited_environment()(
        trim_blocks=True, lstrip_blocks=True, extensions=extensions
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment.from_string(text)


def _limited_environment() -> Any:
    """The class of jinja2's sandbox with a limit on what sums, products, powers and joined texts
    grow to."""
    from jinja2.compiler import CodeGenerator
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

    class Joins(CodeGenerator):
        def visit_Concat(self, node: Any, frame: Any) -> None:
            self.write("environment.join((")
            for part in node.nodes:
                self.visit(part, frame)
                self.write(", ")
            self.write("))")

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("+", "*", "**"))
        code_generator_class = Joins

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if not _is_small(operator, left, right):
                raise SecurityError(f"the result of {operator} is too large")
            return super().call_binop(context, operator, left, right)

        def join(self, parts: tuple[object, ...]) -> str:
            return _joined(str(part) for part in parts)

    return Environment


def _generation_tag() -> Any:
    """`{% generation %}`: it marks what an assistant says, for those who train on it, and writes
    what is within."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 (jinja2 declares it of the instance)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

        def _write(self, caller: Any) -> Any:
            return caller()

    return Generation


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _is_small(operator: str, left: Any, right: Any) -> bool:
    if operator == "**":
        both = isinstance(left, int) and isinstance(right, int)
        return not both or left.bit_length() * abs(right) <= _MAX_BITS
    sizes = [len(value) if hasattr(value, "__len__") else None for value in (left, right)]
    if operator == "+":
        return sum(size or 0 for size in sizes) <= MAX_CHARACTERS
    size, count = (sizes[0], right) if sizes[0] is not None else (sizes[1], left)
    return size is None or not isinstance(count, int) or size * count <= MAX_CHARACTERS


def _joined(pieces: Iterable[str]) -> str:
    texts, size = [], 0
    for piece in pieces:
        texts.append(piece)
        size += len(piece)
        if size > MAX_CHARACTERS:
            raise OverflowError(f"it writes more than {MAX_CHARACTERS} characters")
    return "".join(texts)


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the block after this long. Only in the main thread, where signals
    arrive."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it takes more than {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    # again every second, should the template swallow the first
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
