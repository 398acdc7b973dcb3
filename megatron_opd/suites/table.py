"""The suites of the papers, by name, and groups of them."""

import re
from dataclasses import replace

from megatron_opd.errors import ConfigError
from megatron_opd.files.typed import unknown
from megatron_opd.suites.suite import Only, Suite

_AMC = "AI-MO/aimo-validation-amc"
_MAA = "the problems are the MAA's"
_REDUX = "edinburgh-dawg/mmlu-redux-2.0"
_LCB = "livecodebench/code_generation_lite"
_ANY = ("*test*", "*")
_BY_SUBJECT = ("*/data-*.arrow", *_ANY)  # a folder per subject
_TOLERANCE = {"relative_tolerance": 1e-4}  # of numbers: that of the graders of LUFFY and Qwen

_SUITES = (
    Suite(
        "aime24", "AIME 2024", "HuggingFaceH4/aime_2024", ("*train*", *_ANY), "math", "math",
        _MAA, 30,
    ),
    Suite(
        "aime25", "AIME 2025", "math-ai/aime25", _ANY, "math", "math", _MAA, 30
    ),
    Suite(
        "amc23", "AMC 2023", _AMC, ("*train*", "*"), "math", "math", _MAA, 40,
        Only("url", contains="2023", optional=True),
        note="TrOPD's AMC23 is these 40; LUFFY's and TGPO's AMC is amc_2223.",
    ),
    Suite(
        "amc_2223", "AMC 2022 and 2023", _AMC, ("*train*", "*"), "math", "math",
        _MAA, 83,
        note="What LUFFY and TGPO call AMC.",
    ),
    Suite(
        "math_500", "MATH-500", "HuggingFaceH4/MATH-500", _ANY, "math", "math", "MIT (MATH)", 500
    ),
    Suite(
        "minerva", "Minerva Math", "math-ai/minervamath", _ANY, "math", "math", "not stated", 272,
        grading={**_TOLERANCE, "units": "ignored"},
        note=(
            "58 of the gold answers are written 4.5e33. Here an answer 4.5 \\times 10^{33} is "
            "right; the graders behind the papers' numbers refuse most of them (minerva_legacy)."
        ),
    ),
    Suite(
        "minerva_legacy", "Minerva Math, graded as in the papers", "math-ai/minervamath", _ANY,
        "math", "math_legacy", "not stated", 272, grading=_TOLERANCE,
        note="The one to compare with printed numbers; minerva is the fairer one.",
    ),
    Suite(
        "olympiad", "OlympiadBench, English competition mathematics, text only",
        "Hothan/OlympiadBench", ("*OE_TO_maths_en_COMP*", *_ANY), "olympiad", "math", "Apache-2.0",
        674, grading={"units": "ignored"},
        note="LUFFY's file has 675 rows.",
    ),
    Suite(
        "arc_c", "ARC-Challenge", "allenai/ai2_arc",
        ("*ARC-Challenge*test*", "*[Cc]hallenge*[Tt]est*", *_ANY), "arc", "choice", "CC BY-SA 4.0",
        1172,
    ),
    Suite(
        "gpqa_diamond", "GPQA Diamond", "Idavidrein/gpqa", ("*gpqa_diamond*", "*"), "gpqa",
        "choice", "CC BY 4.0; its authors ask that no question be published", 198, gated=True,
    ),
    Suite(
        "mmlu_pro", "MMLU-Pro", "TIGER-Lab/MMLU-Pro", _ANY, "mmlu_pro", "choice", "MIT", 12032,
        note=(
            "Without a guess where a completion has no answer; the official grader guesses, which "
            "gives about 12 % to a model that never answers."
        ),
    ),
    Suite(
        "mmlu_redux", "MMLU-Redux 2.0, flawless questions", _REDUX, _BY_SUBJECT, "redux",
        "choice", "CC BY 4.0", None, Only("error_type", equals="ok"),
        note="Questions with a marked error are left out, as its authors ask.",
    ),
    Suite(
        "mmlu_redux_all", "MMLU-Redux 2.0, all questions, MMLU's labels", _REDUX, _BY_SUBJECT,
        "redux", "choice", "CC BY 4.0", 5700,
        note="TrOPD's numbers fit these 5,700.",
    ),
    Suite(
        "livecodebench_v6", "LiveCodeBench, the 175 problems that version 6 added", _LCB,
        ("*test6.jsonl", "*"), "code", "code", "CC BY 4.0", 175,
        note="January to April 2025. What TrOPD calls v6.",
    ),
    Suite(
        "livecodebench_release_v6", "LiveCodeBench, all of release 6", _LCB,
        ("*/test*.jsonl", "*"), "code", "code", "CC BY 4.0", 1055,
        note="May 2023 to April 2025; a window is written livecodebench_release_v6:FROM:TO.",
    ),
    Suite(
        "ifbench", "IFBench", "allenai/IFBench_test", ("*train*", *_ANY), "instructions",
        "instructions", "ODC-BY", 300,
        note="TrOPD's numbers fit the first edition of 294 rows, not the present one of 300.",
    ),
)  # fmt: skip
SUITES = {suite.name: suite for suite in _SUITES}
GROUPS = {
    # TGPO, Table 1: in and out of the distribution of its training data
    "tgpo_id": ("aime24", "aime25", "amc_2223", "math_500", "minerva_legacy", "olympiad"),
    "tgpo_ood": ("arc_c", "gpqa_diamond", "mmlu_pro"),
    "tropd_math": ("aime24", "aime25", "amc23"),
    "tropd_all": (
        "aime24", "aime25", "amc23", "gpqa_diamond", "mmlu_redux_all", "ifbench",
        "livecodebench_v6",
    ),
}  # fmt: skip
_AMBIGUOUS = {
    "amc": "amc23 has the 40 problems of 2023 (TrOPD), amc_2223 the 83 of 2022 and 2023 (LUFFY, "
    "TGPO)",
    "livecodebench": "livecodebench_v6 has the 175 problems that version 6 added (TrOPD), "
    "livecodebench_release_v6 all 1,055, or those of a window as "
    "livecodebench_release_v6:2024-08-01:2025-05-31",
    "mmlu": "mmlu_pro has 12,032 questions with up to ten options, mmlu_redux the flawless ones of "
    "MMLU-Redux 2.0, mmlu_redux_all all 5,700",
    "aime": "aime24 and aime25 have 30 problems each",
    "math": "math_500 has 500 problems of MATH; tgpo_id and tropd_math are groups",
    "minerva_math": "minerva takes 4.5 \\times 10^{33} for the gold answer 4.5e33, minerva_legacy "
    "does not, as the papers' graders",
    "gpqa": "gpqa_diamond has 198 questions; no other part of GPQA is a suite",
}
_AMBIGUOUS["lcb"] = _AMBIGUOUS["livecodebench"]
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")


def suites_of(name: str) -> list[Suite]:
    """The suites that a name, or a group's name, means.

    A date window of a code suite is written NAME:FROM:TO, its days as YYYY-MM-DD. Raises
    ConfigError, which explains names that could mean several suites.
    """
    base, colon, window = name.partition(":")
    if base in GROUPS and not colon:
        return [SUITES[member] for member in GROUPS[base]]
    if base in _AMBIGUOUS:
        raise ConfigError(f"--suites {base}: could mean several: {_AMBIGUOUS[base]}")
    if base not in SUITES:
        raise ConfigError(f"--suites {base}: {unknown('suite', base, [*SUITES, *GROUPS])}")
    return [_within(SUITES[base], window) if colon else SUITES[base]]


def _within(suite: Suite, window: str) -> Suite:
    """The suite with the problems of a date window."""
    first, colon, last = window.partition(":")
    if suite.form != "code":
        raise ConfigError(f"--suites {suite.name}:{window}: its questions have no dates")
    if not (colon and _DATE.fullmatch(first) and _DATE.fullmatch(last) and first <= last):
        raise ConfigError(
            f"--suites {suite.name}:{window}: a window is its first and its last day, such as "
            f"{suite.name}:2024-08-01:2025-05-31"
        )
    return replace(
        suite,
        name=f"{suite.name}:{window}",
        title=f"{suite.title}, {first} to {last}",
        questions=None,
        only=Only("contest_date", since=first, until=last),
    )
