"""A user's own suite: a YAML file that names its data.

name: my_suite
data: problems.jsonl            # beside this file, or an id on the Hub
columns: {problem: question, answer: solution}
grader: math
samples: 4
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Le

from megatron_opd.contracts.ranges import Fraction, NonNegativeFloat, PositiveInt
from megatron_opd.contracts.suites import GraderName, SuiteProtocol
from megatron_opd.errors import ConfigError
from megatron_opd.files.typed import InvalidKey, build
from megatron_opd.recipe.yaml_text import read_yaml
from megatron_opd.suites import prompts
from megatron_opd.suites.forms import FORMS
from megatron_opd.suites.hub import parse_id
from megatron_opd.suites.suite import FormName, Suite

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_FORMS: dict[GraderName, FormName] = {
    "math": "math", "math_legacy": "math", "choice": "choice", "instructions": "instructions",
    "code": "code",
}  # fmt: skip


@dataclass(frozen=True)
class OwnSuite:
    """The keys of the file."""

    name: str
    data: str  # a file or folder, from this file's folder; or ORGANISATION/NAME on the Hub
    grader: GraderName = "math"
    # by field (problem, answer, options, id, group, ...), where a column has another name
    columns: dict[str, str] = field(default_factory=dict)
    questions: PositiveInt | None = None  # that are expected
    title: str = ""
    samples: PositiveInt = 1  # of every question
    temperature: Annotated[float, Ge(0), Le(2)] = 0.6
    top_p: Fraction = 0.95
    max_tokens: PositiveInt = 8192
    prompt: str = ""  # with {problem}, and {options} where there are some
    system: str | None = None
    shuffle: Literal["none", "question", "sample"] = "sample"  # of options
    relative_tolerance: NonNegativeFloat = 0.0  # of numbers, of the grader math
    units: Literal["compared", "ignored"] = "compared"  # by the grader math


def read_own(path: Path) -> tuple[Suite, SuiteProtocol, str]:
    """A user's suite, its protocol and where its data are. Raises ConfigError naming the key."""
    try:
        own: OwnSuite = build(OwnSuite, read_yaml(path))
        _check(own)
    except InvalidKey as error:
        raise ConfigError(f"{path}: {error}") from None
    suite = Suite(
        own.name,
        own.title or own.name,
        hub="",
        patterns=("*",),
        form=_FORMS[own.grader],
        grader=own.grader,
        licence="your own",
        questions=own.questions,
        columns=own.columns,
    )
    asked_as = SuiteProtocol(
        name="own",
        samples=own.samples,
        temperature=own.temperature,
        top_p=own.top_p,
        max_tokens=own.max_tokens,
        prompt=own.prompt or prompts.usual(own.grader),
        system=own.system,
        shuffle=own.shuffle if own.grader == "choice" else "none",
        grader=own.grader,
        grading=_grading(own),
    )
    beside = path.parent / own.data
    is_hub = not beside.exists() and parse_id(own.data) is not None
    return suite, asked_as, own.data if is_hub else str(beside)


def _check(own: OwnSuite) -> None:
    """Raises InvalidKey for what the types of the keys do not say."""
    if not _NAME.fullmatch(own.name):
        raise InvalidKey("name", f"must be of letters, digits, _ . and -, got {own.name!r}")
    form = FORMS[_FORMS[own.grader]]
    known = [*form.columns, *(form.more or {})]
    for name in own.columns:
        if name not in known:
            raise InvalidKey(f"columns.{name}", f"unknown; this grader reads {', '.join(known)}")
    if own.temperature == 0 and own.samples > 1:
        raise InvalidKey("samples", "a greedy sample would only be repeated; set temperature")
    if own.top_p == 0:
        raise InvalidKey("top_p", "must be above 0")
    if own.prompt and "{problem}" not in own.prompt:
        raise InvalidKey("prompt", "has no {problem}, so every prompt would be the same; put it in")
    if own.prompt and own.grader == "choice" and "{options}" not in own.prompt:
        raise InvalidKey("prompt", "has no {options}, so that nobody could choose; put it in")


def _grading(own: OwnSuite) -> dict[str, object]:
    if own.grader not in ("math", "math_legacy"):
        return {}
    return {"relative_tolerance": own.relative_tolerance, "units": own.units}
