"""Protocols: how the suites are asked, as a paper did it or as their authors say."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megatron_opd.contracts.suites import SuiteProtocol
from megatron_opd.errors import ConfigError
from megatron_opd.files.typed import unknown
from megatron_opd.recipe.system_messages import SYSTEM_MESSAGES
from megatron_opd.suites import prompts
from megatron_opd.suites.suite import Suite

Shuffle = Literal["none", "question", "sample"]


@dataclass(frozen=True)
class Preset:
    """What a protocol says of all its suites, and how often it samples which."""

    samples: Mapping[str, int]  # by suite; 1 for others
    temperature: float
    top_p: float
    max_tokens: int
    shuffle: Shuffle
    note: str
    system: str | None = None
    prefill: str | None = None
    plain: bool = False  # the question alone: the system message says the rest


PRESETS: Mapping[str, Preset] = {
    "official": Preset(
        {"aime24": 32, "aime25": 32, "amc23": 32, "amc_2223": 32, "gpqa_diamond": 4},
        temperature=0.6,
        top_p=0.95,
        max_tokens=32768,
        shuffle="sample",
        note=(
            "The data's own rules of grading; temperature 0.6, top_p 0.95 and 32,768 tokens, as "
            "makers of reasoning models recommend. Options are shuffled for every sample."
        ),
    ),
    "luffy": Preset(
        {"aime24": 32, "aime25": 32, "amc_2223": 32, "amc23": 32},
        temperature=0.6,
        top_p=1.0,
        max_tokens=8192,
        shuffle="none",
        system=SYSTEM_MESSAGES["tgpo"],
        prefill="<think>\n",
        plain=True,
        note=(
            "LUFFY's harness, which TGPO uses. Its labels are those of the OAT grader; here "
            "math-verify judges. Options are in the data's order, as in its ARC-c file, and "
            "GPQA's are shuffled once; TGPO says that they are shuffled."
        ),
    ),
    "tropd": Preset(
        {"aime24": 32, "aime25": 32, "amc23": 32, "amc_2223": 32, "gpqa_diamond": 4},
        temperature=0.6,
        top_p=0.95,
        max_tokens=8096,
        shuffle="sample",
        note=(
            "Samples per question follow from the digits of TrOPD's tables. It does not state "
            "temperature, top_p and length of its evaluation: 0.6, 0.95 and its training length "
            "stand here. Nor does it state prompts and the order of options."
        ),
    ),
}


# Of single suites, in the place of the preset's: (protocol, suite) -> values and a note.
@dataclass(frozen=True)
class Authors:
    """What the authors of a suite say of its sampling."""

    temperature: float
    top_p: float
    samples: int
    note: str


_AUTHORS_OF = {
    "ifbench": Authors(0.0, 1.0, 1, "IFBench's authors: greedy, 32k tokens."),
    "livecodebench": Authors(
        0.2, 0.95, 10, "LiveCodeBench's authors: ten samples at temperature 0.2."
    ),
    "mmlu_pro": Authors(0.0, 1.0, 1, "Greedy, as its authors; without their five examples."),
}


def protocol_of(
    suite: Suite, name: str, *, samples: int | None = None, max_tokens: int | None = None
) -> SuiteProtocol:
    """How `suite` is asked under a protocol; `samples`, unless it is greedy, and `max_tokens`
    replace its own.

    Raises ConfigError for an unknown name.
    """
    if name not in PRESETS:
        raise ConfigError(f"--protocol {name}: {unknown('protocol', name, PRESETS)}")
    preset = PRESETS[name]
    base = suite.name.partition(":")[0]
    sampled = Authors(preset.temperature, preset.top_p, preset.samples.get(base, 1), preset.note)
    if name == "official":
        for start, authors in _AUTHORS_OF.items():
            if base.startswith(start):
                sampled = authors
    # a greedy sample would only be repeated
    number = 1 if sampled.temperature == 0 else samples or sampled.samples
    return SuiteProtocol(
        name=name,
        samples=number,
        temperature=sampled.temperature,
        top_p=sampled.top_p,
        max_tokens=max_tokens or preset.max_tokens,
        prompt=prompts.usual(suite.grader, plain=preset.plain),
        system=preset.system,
        prefill=preset.prefill,
        shuffle=_shuffle(suite, preset),
        grader=suite.grader,
        grading=suite.grading,
        note=sampled.note,
    )


def _shuffle(suite: Suite, preset: Preset) -> Shuffle:
    if suite.grader != "choice":
        return "none"
    # GPQA's data have the right option first: their order would give every answer away.
    return "question" if suite.form == "gpqa" and preset.shuffle == "none" else preset.shuffle
