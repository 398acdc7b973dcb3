"""Checks of `reward`: its keys before a file is opened, and the rows that it will grade."""

import inspect
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import assert_never

from megatron_opd.contracts.rows import Task
from megatron_opd.errors import ConfigError, DataError
from megatron_opd.files.own_code import checked_own
from megatron_opd.methods.advantages import RewardAdvantage
from megatron_opd.recipe.keys import RunConfig
from megatron_opd.recipe.rewards import (
    ChoiceReward,
    CodeReward,
    FormatReward,
    MathReward,
    PythonReward,
    Reward,
    RewardConfig,
    grades,
)
from megatron_opd.verify.answer import read_gold
from megatron_opd.verify.columns import gold_letter, options_of, program_tests
from megatron_opd.verify.graders.code import refusal_of
from megatron_opd.verify.graders.code_tests import BadTests, read_tests
from megatron_opd.verify.rewards import PENALTY

# fraction of rows that nothing can be compared with, above which the data are refused
MOST_BAD_GOLDS = 0.05
_MOST_CODE_ROWS = 1000  # whose tests are read: those of a problem can be large
_NAME = re.compile(r"[\w-]+")
_ANSWER_LINE = re.compile(r"\banswer\s*:\s*\S", re.IGNORECASE)
_ARGUMENTS = ("prompt", "completion", "row", "tokens")


def check_reward_keys(config: RunConfig) -> None:
    """Refuses keys without effect, functions that are not there, patterns that are none.

    Raises ConfigError.
    """
    reward = config.reward
    _check_effect(reward)
    _check_overlong(config)
    if reward.function:
        checked_own("reward.function", reward.function, "function")
    for name, one in reward.graded.items():
        key = f"reward.rewards.{name}" if reward.rewards else "reward"
        if reward.rewards and (name == PENALTY or not _NAME.fullmatch(name)):
            raise ConfigError(
                f"{key}: {name!r} cannot be the name of a reward; use letters, digits, - and _, "
                f"and not {PENALTY}"
            )
        if one.sources and config.data.source_column is None and not config.data.parts:
            raise ConfigError(
                f"{key}.sources: needs data.source_column, the column that says where a row is from"
            )
        _check_one(key, one)


def _check_effect(reward: RewardConfig) -> None:
    """Keys of the only reward must keep their defaults beside those that replace it."""
    usual = RewardConfig()
    unused: dict[str, str] = {}
    if reward.function:
        why = "with reward.function, which gets whole completions"
        unused = dict.fromkeys(("answer", "max_characters", "kind", "python", "rewards"), why)
    elif reward.rewards:
        unused = dict.fromkeys(("kind", "python", "answer"), "with reward.rewards")
        if not any(reward.rewards.values()):
            raise ConfigError("reward.rewards: every reward is null; leave one, or remove the key")
    else:
        if reward.kind != "python":
            unused["python"] = f"with reward.kind={reward.kind}"
        if reward.kind != "math":
            unused["answer"] = f"with reward.kind={reward.kind}"
    for name, why in unused.items():
        if getattr(reward, name) != getattr(usual, name):
            raise ConfigError(f"reward.{name}: no effect {why}; remove it")
    if reward.kind == "python" and not reward.python and not reward.rewards:
        raise ConfigError(
            "reward.python: missing; reward.kind=python needs module:function or file.py:function"
        )


def _check_overlong(config: RunConfig) -> None:
    """The same penalty must not be taken twice."""
    if config.reward.length_penalty is None:
        return
    for name, term in config.method.terms.items():
        advantages = getattr(term, "advantages", {})
        for key, one in advantages.items():
            if isinstance(one, RewardAdvantage) and one.overlong:
                raise ConfigError(
                    f"reward.length_penalty: method.{name}.advantages.{key}.overlong takes it "
                    "already; remove one"
                )


def _check_one(key: str, reward: Reward) -> None:
    match reward:
        case MathReward() | ChoiceReward():
            pass
        case CodeReward():
            if refusal := refusal_of(reward.grading):
                raise ConfigError(f"{key}: {refusal}")
        case FormatReward():
            try:
                re.compile(reward.pattern, re.DOTALL)
            except re.error as error:
                raise ConfigError(
                    f"{key}.pattern: no regular expression of Python: {error}"
                ) from None
        case PythonReward():
            function = checked_own(f"{key}.python", reward.python, "function")
            _check_arguments(f"{key}.python", reward.python, function)
        case _:
            assert_never(reward)


def _check_arguments(key: str, reference: str, function: object) -> None:
    assert callable(function), "checked_own has refused others"
    try:
        inspect.signature(function).bind(*_ARGUMENTS)
    except ValueError:  # of a builtin, which does not say
        return
    except TypeError as error:
        raise ConfigError(
            f"{key}: {reference} must take ({', '.join(_ARGUMENTS)}): {error}"
        ) from None


def check_rewarded(config: RunConfig, tasks: Sequence[Task], key: str) -> list[str]:
    """Checks that every row is graded, and can be. Returns warnings. Raises DataError."""
    warnings = _judged_by_format(config, tasks, key)
    rewards = config.reward.graded
    graded = dict.fromkeys(range(len(tasks)), False)
    for name, reward in rewards.items():
        places = [place for place, task in enumerate(tasks) if grades(reward, task.source)]
        graded |= dict.fromkeys(places, True)
        of_reward = f"{key}, reward.rewards.{name}" if config.reward.rewards else key
        warnings += _check_rows(config, reward, [tasks[place] for place in places], of_reward)
    if rewards and not all(graded.values()):
        sources = Counter(tasks[place].source for place, by_one in graded.items() if not by_one)
        source, count = sources.most_common(1)[0]
        raise DataError(
            f"{key}: no reward grades the {count} rows of source {source!r}; name it in "
            "reward.rewards.NAME.sources, or leave the sources of one reward empty"
        )
    return warnings


def _judged_by_format(config: RunConfig, tasks: Sequence[Task], key: str) -> list[str]:
    """Warns of rows that count as right by their format, where other rows are judged by more."""
    rewards = config.reward.graded.values()
    if all(isinstance(reward, FormatReward) for reward in rewards):
        return []
    counts: Counter[str] = Counter()
    for task in tasks:
        first = next((reward for reward in rewards if grades(reward, task.source)), None)
        if isinstance(first, FormatReward):
            counts[task.source] += 1
    return [
        f"{key}: {count} of {len(tasks)} rows, of source {source!r}, count as right by their "
        "format: no reward ahead of it in reward.rewards grades them"
        for source, count in sorted(counts.items())
    ]


def unknown_sources(config: RunConfig, tasks: Sequence[Task]) -> list[str]:
    """Warns of sources that a reward names and no row has."""
    there = {task.source for task in tasks}
    warnings = []
    for name, reward in config.reward.graded.items():
        missing = [source for source in reward.sources if source not in there]
        if missing:
            warnings.append(
                f"reward.rewards.{name}.sources: no row has source {', '.join(missing)}; there are "
                f"{', '.join(sorted(there))[:200]}"
            )
    return warnings


def _check_rows(config: RunConfig, reward: Reward, tasks: Sequence[Task], key: str) -> list[str]:
    match reward:
        case MathReward():
            readable = {gold: read_gold(gold) is not None for gold in {t.answer for t in tasks}}
            warnings = _unreadable(tasks, lambda task: readable[task.answer], key)
            return warnings + _asked_for_unread_answers(config, reward, tasks, key)
        case ChoiceReward():

            def names_an_option(task: Task) -> bool:
                options = options_of(task.columns, reward.options_column)
                return bool(options) and gold_letter(task.answer, options or ()) is not None

            return _unreadable(tasks, names_an_option, key, "gold answers name no option")
        case CodeReward():
            without = "rows have no tests that can be run"
            return _unreadable(tasks[:_MOST_CODE_ROWS], _has_tests, key, without)
        case FormatReward() | PythonReward():
            return []
        case _:
            assert_never(reward)


def _has_tests(task: Task) -> bool:
    try:
        read_tests(program_tests(task))
    except BadTests:
        return False
    return True


def _unreadable(
    tasks: Sequence[Task],
    can_be_read: Callable[[Task], bool],
    key: str,
    problem: str = "gold answers state no value to compare with",
) -> list[str]:
    """Counts the gold answers that nothing can be compared with.

    Reads them as the verifier will, without computer algebra: microseconds each. Raises DataError
    when more than MOST_BAD_GOLDS of them are such.
    """
    bad = [task for task in tasks if not can_be_read(task)]
    if not bad:
        return []
    first = f"row {bad[0].index + 1} ({bad[0].answer[:60]!r})"
    line = f"{key}: bad_gold: {len(bad)} of {len(tasks)} {problem}, first {first}"
    if len(bad) > MOST_BAD_GOLDS * len(tasks):
        raise DataError(f"{line}; mend or remove them, or name another answer_column")
    return [f"{line}; every answer to them scores 0"]


def _asked_for_unread_answers(
    config: RunConfig, reward: MathReward, tasks: Sequence[Task], key: str
) -> list[str]:
    """Counts the prompts that ask for "Answer: ..." and no box, where only a box is read."""
    asked = [task for task in tasks if _ANSWER_LINE.search(task.text) and "boxed" not in task.text]
    if reward.answer != "boxed" or not asked:
        return []
    return [
        f"reward.answer: {len(asked)} of {len(tasks)} prompts of {key} ask for an answer after "
        '"Answer:" and none in a box, which alone is read; set reward.answer=boxed_or_last'
    ]
