"""What a first recipe is drafted from: given as options, or asked on a terminal. No torch."""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_opd.architectures.config import ModelConfig
from megatron_opd.architectures.known import architectures
from megatron_opd.errors import ConfigError, DataError, OpdError
from megatron_opd.planning.hardware import hardware
from megatron_opd.recipe.load import recipe_files
from megatron_opd.tasks.data_files import data_files

MOST_GPUS = 4096


@dataclass(frozen=True)
class Answers:
    """The answers; None where there is none yet."""

    student: str | None = None
    teacher: str | None = None  # "": none
    data: str | None = None
    heldout: str | None = None  # "": none
    gpus: int | None = None  # on the host: processes
    gpu: str | None = None
    method: str | None = None  # None: chosen by what there is


@dataclass(frozen=True)
class Question:
    """A question of one answer."""

    field: str
    text: str
    check: Callable[[str], None]  # raises OpdError
    default: str | None = None  # None: it must be answered


def complete(answers: Answers) -> Answers:
    """The answers with those that are missing, asked where there is a terminal.

    Each is checked; a wrong one is asked for again. Raises ConfigError where an option is wrong or
    missing and there is nobody to ask, DataError where a model or the data is.
    """
    for question in QUESTIONS:
        given = getattr(answers, question.field)
        if given is None:
            given = _answer(question)
        else:
            _check_printable(question, str(given))
            question.check(str(given))
        value: Any = int(given) if question.field == "gpus" else given
        answers = replace(answers, **{question.field: value})
    return answers


def _answer(question: Question) -> str:
    option = f"--{question.field}"
    if not sys.stdin.isatty():
        if question.default is None:
            raise ConfigError(f"{option}: missing, and there is no terminal to ask on; give it")
        return question.default
    while True:
        default = f" [{question.default or 'none'}]" if question.default is not None else ""
        try:
            text = input(f"{question.text}{default}: ").strip() or question.default
        except EOFError:
            print()
            raise ConfigError(f"{option}: was not answered; give it") from None
        if text is None:
            continue
        try:
            _check_printable(question, text)
            question.check(text)
        except OpdError as error:
            print(f"  {error}")
        else:
            return text


def _check_printable(question: Question, text: str) -> None:
    if not text.isprintable():
        raise ConfigError(f"--{question.field}: {text!r} has characters that cannot be printed")


def _check_model(text: str) -> None:
    if not text:
        raise ConfigError("--student: is empty; give a model directory")
    architectures({"model": ModelConfig(text)})


def _check_teacher(text: str) -> None:
    if text:
        _check_model(text)


def _check_data(text: str) -> None:
    if not text:
        raise DataError("--data: is empty; give a .jsonl, .json or .parquet file")
    data_files(text, "--data")


def _check_heldout(text: str) -> None:
    if text:
        data_files(text, "--heldout")


def _check_gpus(text: str) -> None:
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text) <= MOST_GPUS:
        raise ConfigError(f"--gpus: {text!r} is not a number from 1 to {MOST_GPUS}")


def _check_gpu(text: str) -> None:
    hardware(text, 1)


QUESTIONS = (
    Question("student", "The model to train (a directory)", _check_model),
    Question("teacher", "The model to learn from", _check_teacher, ""),
    Question("data", "The prompts (.jsonl, .json or .parquet)", _check_data),
    Question("heldout", "Prompts to measure accuracy on", _check_heldout, ""),
    Question("gpus", "How many GPUs, or processes on a CPU", _check_gpus),
    Question("gpu", "Which kind (a100, h100, h800 or cpu)", _check_gpu),
)


def recipe_file(name: str) -> Path:
    """The file of a new recipe. Raises ConfigError where the name cannot be one, or is taken."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or name.endswith((".yaml", ".yml")):
        raise ConfigError(
            f"{name!r}: is no name of a recipe; begin with a letter or a digit, go on with these, "
            "'.', '_' and '-', and leave out .yaml"
        )
    path = Path("recipes") / f"{name}.yaml"
    taken = path if path.exists() or path.is_symlink() else recipe_files().get(name)
    if taken:
        raise ConfigError(f"{name}: there is a recipe {taken}; choose another name")
    return path
