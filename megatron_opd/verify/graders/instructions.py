"""The grader of IFBench: the package `if-verifiable` checks whether instructions were followed, in
workers that can be killed."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from megatron_opd.contracts.rows import NOT_JUDGED, Verdict
from megatron_opd.contracts.suites import Answer
from megatron_opd.errors import ConfigError
from megatron_opd.verify.graders.maths import Judges
from megatron_opd.verify.graders.reasoning import conclusion, no_answer

RULES = "1"  # of this grader; another number is another grader
LONGEST = 200_000  # characters of a response that is checked
PACKAGE = "if-verifiable"
# Data of NLTK, without which a third of the questions cannot be graded.
NLTK_DATA = (
    "tokenizers/punkt_tab",
    "corpora/stopwords",
    "taggers/averaged_perceptron_tagger_eng",
)
SCORES = ("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose")


class InstructionGrader:
    """Judges whether a response follows its instructions: score and correctness are the paper's
    prompt-level loose ones, `parts` has all four."""

    def __init__(self, judges: Judges) -> None:
        self._judges = judges
        self.versions: Mapping[str, str] = {
            "rules": RULES, **{name: version(name) for name in (PACKAGE, "nltk", "langdetect")}
        }  # fmt: skip

    def grade(self, answers: Sequence[Answer]) -> list[Verdict]:
        """The verdicts in their order.

        Reasons: correct, wrong, no_answer (nothing behind the reasoning), truncated, bad_gold (an
        instruction that the package does not know), too_long, timeout, over_budget, crashed, error.
        Raises RunError where no worker starts.
        """
        texts = [(conclusion(answer) or "").strip() for answer in answers]
        pairs = [
            (text, _wanted(answer)) for answer, text in zip(answers, texts, strict=True) if text
        ]
        replies = iter(self._judges.replies(pairs))
        verdicts = []
        for answer, text in zip(answers, texts, strict=True):
            reply = next(replies) if text else no_answer(answer)
            verdicts.append(_verdict(reply))
        return verdicts


def check_packages() -> None:
    """Raises ConfigError where the package or NLTK's data are missing. Imports neither."""
    try:
        version(PACKAGE)
    except PackageNotFoundError:
        raise ConfigError(
            f"ifbench: needs the package {PACKAGE}; install megatron-opd[ifbench]"
        ) from None
    folders = [Path(text) for text in os.environ.get("NLTK_DATA", "").split(os.pathsep) if text]
    folders += [Path.home() / "nltk_data", Path(sys.prefix) / "nltk_data"]
    folders += [Path(sys.prefix) / "share" / "nltk_data", Path(sys.prefix) / "lib" / "nltk_data"]
    folders += [Path("/usr/share/nltk_data"), Path("/usr/local/share/nltk_data")]
    folders += [Path("/usr/lib/nltk_data"), Path("/usr/local/lib/nltk_data")]
    missing = [name for name in NLTK_DATA if not any(_has(folder, name) for folder in folders)]
    if missing:
        names = [name.rpartition("/")[2] for name in missing]
        raise ConfigError(
            f"ifbench: NLTK's data {', '.join(names)} are missing; where there is a network: "
            f"python -m nltk.downloader -d FOLDER {' '.join(names)}, then set NLTK_DATA=FOLDER"
        )


def _has(folder: Path, name: str) -> bool:
    return (folder / name).exists() or (folder / f"{name}.zip").exists()


def _wanted(answer: Answer) -> str:
    question = answer.asked.question
    return json.dumps({"prompt": question.text, **question.details})


def _verdict(reply: str) -> Verdict:
    """The verdict of a worker's reply: a reason, or "checked" and a number per score."""
    word, *numbers = reply.split(" ")
    if word != "checked":
        return Verdict(0.0, None if word in NOT_JUDGED else False, word)
    parts = dict(zip(SCORES, map(float, numbers), strict=True))
    followed = parts["prompt_loose"] == 1
    return Verdict(
        parts["prompt_loose"],
        followed,
        "correct" if followed else "wrong",
        parts=tuple(parts.items()),
    )
