"""The tasks of a run, from its data files."""

import logging
from collections.abc import Callable
from dataclasses import replace
from itertools import batched
from pathlib import Path

from megatron_opd.contracts.rows import Task
from megatron_opd.errors import ConfigError, DataError
from megatron_opd.files.rows import BadRows
from megatron_opd.recipe.keys import DataConfig, RunConfig
from megatron_opd.tasks.data_files import data_files
from megatron_opd.tasks.examples import read_examples
from megatron_opd.tasks.notes import Notes
from megatron_opd.tasks.template import check_chat_template
from megatron_opd.tasks.tokenise import tokenise
from megatron_opd.tasks.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

TOKENISE_ROWS = 1000  # per call of the tokenizer


def load_training(
    config: RunConfig,
    tokenizer: Tokenizer,
    *,
    need_answer: bool,
    need_trace: bool,
    warn: Callable[[str], None] = logger.warning,
) -> list[Task]:
    """The recipe's training tasks. Raises ConfigError, DataError."""
    return load_tasks(
        config.data.train,
        config.data,
        tokenizer,
        max_prompt_tokens=_max_prompt_tokens(config),
        max_sequence_length=config.max_sequence_length,
        need_answer=need_answer and config.reward.needs_answers,
        need_trace=need_trace,
        need_columns=config.reward.reads_rows,
        warn=warn,
    )


def load_heldout(
    config: RunConfig, tokenizer: Tokenizer, warn: Callable[[str], None] = logger.warning
) -> list[Task]:
    """The recipe's held-out tasks: the first `eval.num_prompts` of them, or all."""
    heldout = config.data.heldout_set
    assert heldout is not None
    columns = replace(
        config.data, problem_column=heldout.problem_column, answer_column=heldout.answer_column
    )
    tasks = load_tasks(
        heldout.path,
        columns,
        tokenizer,
        key="data.heldout",
        max_prompt_tokens=_max_prompt_tokens(config),
        max_sequence_length=config.max_sequence_length,
        need_answer=config.reward.needs_answers,
        need_trace=False,
        need_columns=config.reward.reads_rows,
        warn=warn,
    )
    count = config.eval.num_prompts if config.eval else 0
    return tasks[: count or None]


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
