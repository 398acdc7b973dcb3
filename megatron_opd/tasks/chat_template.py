"""A model's chat template, rendered as transformers does, but with limits.

A template is a program of the model's makers. A sandbox keeps it from Python's internals, a time
limit ends its loops, and a size limit holds for its output, sums, products, powers and joined
texts. The memory of a single filter, such as `center`, has no limit.
"""

import functools
import json
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date, datetime, time
from types import FrameType
from typing import Any

from megatron_opd.errors import DataError
from megatron_opd.tasks.messages import Message

MAX_SECONDS = 10.0  # of one prompt; real templates take less than a millisecond
MAX_CHARACTERS = 2**24
_MAX_BITS = 2**16  # of a power
# What every template is given.
OWN_VARIABLES = frozenset(
    ("messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now")
)
_REMEDY = "set data.template.kind=raw, or mend the template"


@dataclass(frozen=True)
class ChatTemplate:
    """A template, with its source and the special tokens, by name, that it may write."""

    source: str
    text: str
    special_tokens: Mapping[str, str]
    arguments: Mapping[str, object] = field(default_factory=dict)  # that it reads beside

    def variables(self) -> set[str]:
        """The names that the template reads and does not set itself. Raises DataError."""
        from jinja2.meta import find_undeclared_variables

        try:
            return find_undeclared_variables(_environment(date.min).parse(self.text))
        except Exception as error:
            raise self._failure(error) from error

    def render(self, messages: Sequence[Message], day: date) -> str:
        """The prompt text, which ends where the model's completion starts.

        `day` is the template's today. Raises DataError when the template fails in any way.
        """
        try:
            with _time_limit(MAX_SECONDS):
                texts = _compiled(self.text, day).generate(
                    **{**self.special_tokens, **self.arguments},
                    messages=list(messages),
                    tools=None,
                    documents=None,
                    add_generation_prompt=True,
                )
                return _joined(texts)
        except Exception as error:  # a program of others can raise anything
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> DataError:
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        return DataError(f"{self.source}: the chat template fails ({cause:.200}); {_REMEDY}")


def only_template(templates: object, source: str) -> str:
    """The template of a tokenizer, which is one text, or several by name with one named `default`.

    Raises DataError when there is none.
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
    return _environment(day).from_string(text)


def _environment(day: date) -> Any:
    """An environment with transformers' settings, filters and functions."""
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
    return environment


def _limited_environment() -> Any:
    """jinja2's sandbox with a limit on the size of sums, products, powers and joined texts."""
    from jinja2.compiler import CodeGenerator
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

    class Joins(CodeGenerator):
        def visit_Concat(self, node: Any, frame: Any) -> None:
            self.write("environment.join((")
            for text in node.nodes:
                self.visit(text, frame)
                self.write(", ")
            self.write("))")

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("+", "*", "**"))
        code_generator_class = Joins

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if not _is_small(operator, left, right):
                raise SecurityError(f"the result of {operator} is too large")
            return super().call_binop(context, operator, left, right)

        def join(self, texts: tuple[object, ...]) -> str:
            return _joined(map(str, texts))

    return Environment


def _generation_tag() -> Any:
    """The tag `{% generation %}`, which marks the assistant's text and writes its own content."""
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
    left_size = len(left) if hasattr(left, "__len__") else None
    right_size = len(right) if hasattr(right, "__len__") else None
    if operator == "+":
        return (left_size or 0) + (right_size or 0) <= MAX_CHARACTERS
    if left_size is not None:
        return _is_small_product(left_size, right)
    return right_size is None or _is_small_product(right_size, left)


def _is_small_product(size: int, count: object) -> bool:
    return not isinstance(count, int) or size * count <= MAX_CHARACTERS


def _joined(texts: Iterable[str]) -> str:
    written = []
    size = 0
    for text in texts:
        written.append(text)
        size += len(text)
        if size > MAX_CHARACTERS:
            raise OverflowError(f"it writes more than {MAX_CHARACTERS} characters")
    return "".join(written)


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the block after so many seconds.

    Only in the main thread, where signals arrive; in others there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it takes more than {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    # Repeated every second, in case the template swallows the first.
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
