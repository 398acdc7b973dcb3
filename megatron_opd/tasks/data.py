"""The tasks of a run, from its data files."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import batched
from pathlib import Path

from megatron_opd.contracts.rows import Task
from megatron_opd.errors import ConfigError, DataError
from megatron_opd.files.rows import BadRows
from megatron_opd.recipe.data import DataConfig
from megatron_opd.recipe.keys import RunConfig
from megatron_opd.tasks.data_files import data_files
from megatron_opd.tasks.examples import read_examples
from megatron_opd.tasks.notes import Notes
from megatron_opd.tasks.template import check_chat_template
from megatron_opd.tasks.tokenise import tokenise
from megatron_opd.tasks.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

TOKENISE_ROWS = 1000  # per call of the tokenizer


@dataclass(frozen=True)
class Part:
    """A part of the training data, or all of it."""

    key: str  # the recipe's
    paths: str | list[str]
    columns: DataConfig  # with the part's own


def training_parts(data: DataConfig) -> dict[str, Part]:
    """The parts of the training data by name; without a mixture data.train by ""."""
    if not data.parts:
        return {"": Part("data.train", data.train, data)}
    parts = {}
    for name, part in data.parts.items():
        columns = replace(
            data,
            problem_column=part.problem_column or data.problem_column,
            answer_column=part.answer_column or data.answer_column,
            trace_column=part.trace_column or data.trace_column,
        )
        parts[name] = Part(f"data.mixture.{name}", part.path, columns)
    return parts


def load_training(
    config: RunConfig,
    tokenizer: Tokenizer,
    *,
    need_answer: bool,
    need_trace: bool,
    warn: Callable[[str], None] = logger.warning,
) -> dict[str, list[Task]]:
    """The recipe's training tasks by the parts of its mixture; those of data.train by "".

    Their indices are unique. Raises ConfigError, DataError.
    """
    loaded: dict[str, list[Task]] = {}
    before = 0  # the first index of a part
    for name, part in training_parts(config.data).items():
        tasks = load_tasks(
            part.paths,
            part.columns,
            tokenizer,
            key=part.key,
            max_prompt_tokens=_max_prompt_tokens(config),
            max_sequence_length=config.max_sequence_length,
            need_answer=need_answer and config.reward.needs_answers,
            need_trace=need_trace,
            need_columns=config.reward.reads_rows,
            warn=warn,
        )
        loaded[name] = [
            replace(task, index=before + task.index, source=task.source or name) for task in tasks
        ]
        before = loaded[name][-1].index + 1
    return loaded


def load_heldout(
    config: RunConfig, tokenizer: Tokenizer, warn: Callable[[str], None] = logger.warning
) -> dict[str, list[Task]]:
    """The recipe's held-out tasks by set, those of data.heldout by "": the first ones of each, or
    all."""
    data = replace(config.data, curriculum=None)
    loaded: dict[str, list[Task]] = {}
    if heldout := data.heldout_set:
        columns = replace(
            data, problem_column=heldout.problem_column, answer_column=heldout.answer_column
        )
        tasks = _load_set(config, heldout.path, columns, "data.heldout", tokenizer, warn)
        loaded[""] = tasks[: config.evaluation_of("").num_prompts or None]
    for name, one in data.sets.items():
        template = one.template or data.template
        columns = replace(
            data,
            problem_column=one.problem_column or data.problem_column,
            answer_column=one.answer_column or data.answer_column,
            source_column=None if one.source else one.source_column or data.source_column,
            # the run's day, which is pinned
            template=replace(template, date=template.date or data.template.date),
        )
        key = f"data.heldout_sets.{name}"
        tasks = _load_set(config, one.path, columns, key, tokenizer, warn)
        count = config.evaluation_of(name).num_prompts
        loaded[name] = [
            replace(task, source=one.source or task.source) for task in tasks[: count or None]
        ]
    return loaded


def _load_set(
    config: RunConfig,
    paths: str | list[str],
    columns: DataConfig,
    key: str,
    tokenizer: Tokenizer,
    warn: Callable[[str], None],
) -> list[Task]:
    return load_tasks(
        paths,
        columns,
        tokenizer,
        key=key,
        max_prompt_tokens=_max_prompt_tokens(config),
        max_sequence_length=config.max_sequence_length,
        need_answer=config.reward.needs_answers,
        need_trace=False,
        need_columns=config.reward.reads_rows,
        warn=warn,
    )


def load_tasks(
    paths: str | Path | list[str],
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    key: str = "data.train",
    max_prompt_tokens: int,
    max_sequence_length: int,
    need_answer: bool,
    need_trace: bool,
    need_columns: bool = False,
    warn: Callable[[str], None] = logger.warning,
) -> list[Task]:
    """Reads, checks, renders and tokenises data files. Imports no torch: checks call it too.

    `Task.index` is the row's number from 0, over all files. With `need_trace`, `trace_ids` are the
    trace's tokens and an end; a trace that repeats the prompt's last words, `template.prefill` or
    `<think>`, goes on after them. By `data.bad_rows` and `data.long_prompts`, rows that cannot be
    read or do not fit are errors, or dropped and counted. `warn` gets a line for all that is odd.

    Raises DataError with the file, the row and the remedy.
    """
    if "{problem}" not in config.template.text:
        raise ConfigError(
            "data.template.text: has no {problem}, so every prompt would be the same; put it in"
        )
    if config.template.kind == "chat":
        check_chat_template(
            config.template, tokenizer
        )  # checked first: if there is none, no row is to blame
    bad_rows = BadRows(config.bad_rows)
    notes = Notes(config.template)
    files = data_files(paths if isinstance(paths, list) else str(paths), key)
    examples = read_examples(
        files,
        config,
        key,
        bad_rows,
        need_answer=need_answer,
        need_trace=need_trace,
        need_columns=need_columns,
    )
    tasks = []
    too_long = 0
    for batch in batched(examples, TOKENISE_ROWS):
        for example, task in zip(batch, tokenise(batch, config, tokenizer), strict=True):
            problem = _misfit(task, config, max_prompt_tokens, max_sequence_length)
            if problem is None:
                tasks.append(task)
                notes.add(task, example.problem.before, f"{example.path}:{example.number}")
            elif config.long_prompts == "error":
                raise example.error(f"{problem}; raise it or set data.long_prompts=drop")
            else:
                too_long += 1
    rows = len(tasks) + too_long + bad_rows.count
    if not tasks:
        bad_rows.raise_first()
        raise DataError(f"{files[0]}: all {too_long} rows are too long; raise max_sequence_length")
    bad_rows.warn(rows, warn)
    if too_long:
        warn(f"{key}: dropped {too_long} of {rows} rows that are too long")
    notes.warn(key, warn)
    return tasks


def _max_prompt_tokens(config: RunConfig) -> int:
    longest = config.max_sequence_length - 1
    return min(config.data.max_prompt_tokens or longest, longest)


def _misfit(
    task: Task, config: DataConfig, max_prompt_tokens: int, max_sequence_length: int
) -> str | None:
    """The reason why a task cannot be used, which ends with the limit; None if it can."""
    prompt_tokens = len(task.prompt_ids)
    if prompt_tokens > max_prompt_tokens and max_prompt_tokens == config.max_prompt_tokens:
        return (
            f"the prompt has {prompt_tokens} tokens, more than "
            f"data.max_prompt_tokens={max_prompt_tokens}"
        )
    if prompt_tokens > max_prompt_tokens:
        return (
            f"the prompt has {prompt_tokens} tokens, max_sequence_length leaves room for "
            f"{max_prompt_tokens}"
        )
    if task.trace_ids is not None and prompt_tokens + len(task.trace_ids) > max_sequence_length:
        total = prompt_tokens + len(task.trace_ids)
        return (
            f"prompt and trace have {total} tokens, more than "
            f"max_sequence_length={max_sequence_length}"
        )
    return None
