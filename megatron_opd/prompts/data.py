"""Data files -> prompts."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import batched
from pathlib import Path

import numpy as np

from megatron_opd.config.schema import DataConfig, RunConfig
from megatron_opd.errors import ConfigError, DataError
from megatron_opd.prompts.columns import (
    Columns,
    choose_columns,
    read_answer,
    read_problem,
    read_trace,
    verified_columns,
)
from megatron_opd.prompts.rows import RowError, column_names, read_rows
from megatron_opd.prompts.template import render
from megatron_opd.prompts.tokenizer import Tokenizer, eos_token_id
from megatron_opd.records import Prompt

logger = logging.getLogger(__name__)

TRACE_IDS_OF, TRACE_IDS_COLUMN = "response", "token_ids"  # as `megatron-opd traces` writes them
TOKENISE_ROWS = 1000  # per call of the tokenizer


@dataclass(frozen=True)
class _Example:
    """A row's fields; number counts from 1."""

    number: int
    problem: str
    answer: str
    trace: str | None
    trace_ids: list[int] | None  # the trace's own tokens, from a file of `megatron-opd traces`


def load_training(config: RunConfig, tokenizer: Tokenizer, *, need_answer: bool, need_trace: bool) -> list[Prompt]:
    """The recipe's training prompts."""
    return load_prompts(
        config.data.train,
        config.data,
        tokenizer,
        max_prompt_tokens=config.max_sequence_length - 1,
        max_sequence_length=config.max_sequence_length,
        need_answer=need_answer,
        need_trace=need_trace,
    )


def load_heldout(config: RunConfig, tokenizer: Tokenizer) -> list[Prompt]:
    """The recipe's held-out prompts: the first `eval.num_prompts` of the file, or all."""
    assert config.data.heldout is not None
    prompts = load_prompts(
        config.data.heldout,
        config.data,
        tokenizer,
        max_prompt_tokens=config.max_sequence_length - 1,
        max_sequence_length=config.max_sequence_length,
        need_answer=True,
        need_trace=False,
    )
    count = config.eval.num_prompts if config.eval else 0
    return prompts[: count or None]


def load_prompts(
    path: str | Path,
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    max_prompt_tokens: int,
    max_sequence_length: int,
    need_answer: bool,
    need_trace: bool,
) -> list[Prompt]:
    """Read, check, render and tokenise a data file. No torch: the pre-flight check calls it too.

    `Prompt.index` is the row number from 0. With `need_trace`, `trace_ids` are the trace's tokens and EOS; a trace
    that repeats `template.prefill` at its start continues after it. Rows that do not fit are errors, or dropped and
    counted in a warning, as `data.long_prompts` says.

    Raises DataError with the file, the row and the remedy.
    """
    path = Path(path)
    if "{problem}" not in config.template.text:
        raise ConfigError("data.template.text: has no {problem}, so every prompt would be the same; put it in")
    found = column_names(path)
    columns = choose_columns(path, found, config, need_answer=need_answer, need_trace=need_trace)
    examples = _read_examples(path, columns, found, need_answer=need_answer, need_trace=need_trace)
    prompts, dropped = [], 0
    for batch in batched(examples, TOKENISE_ROWS):
        for example, prompt in zip(batch, _tokenise(path, batch, config, tokenizer), strict=True):
            problem = _misfit(prompt, max_prompt_tokens, max_sequence_length)
            if problem is None:
                prompts.append(prompt)
            elif config.long_prompts == "error":
                raise RowError(path, example.number, f"{problem}; raise it or set data.long_prompts=drop")
            else:
                dropped += 1
    if not prompts:
        raise DataError(f"{path}: all {dropped} rows are too long; raise max_sequence_length")
    if dropped:
        logger.warning("%s: dropped %d of %d rows that are too long", path, dropped, dropped + len(prompts))
    return prompts


def _read_examples(
    path: Path, columns: Columns, found: list[str], *, need_answer: bool, need_trace: bool
) -> Iterator[_Example]:
    own_tokens = [TRACE_IDS_COLUMN] if columns.trace == TRACE_IDS_OF and TRACE_IDS_COLUMN in found else []
    to_read = list(dict.fromkeys(columns.to_read + own_tokens + (verified_columns(found) if need_trace else [])))
    for number, row in read_rows(path, to_read):
        problem, answer, trace = read_problem(row, columns), read_answer(row, columns), read_trace(row, columns)
        if problem is None:
            raise RowError(path, number, f"no problem text in column {columns.problem}; fill it or remove the row")
        if need_answer and answer is None:
            raise RowError(path, number, f"no answer in column {columns.answer}; fill it or remove the row")
        if need_trace and trace is None:
            raise RowError(path, number, f"no (verified) trace in column {columns.trace}; fill it or remove the row")
        yield _Example(number, problem, answer or "", trace, row[TRACE_IDS_COLUMN] if own_tokens else None)


def _tokenise(path: Path, examples: tuple[_Example, ...], config: DataConfig, tokenizer: Tokenizer) -> list[Prompt]:
    template = config.template
    texts = [render(template, tokenizer, example.problem) for example in examples]
    # A chat template writes the special tokens itself.
    prompt_ids = _encode(tokenizer, texts, add_special_tokens=template.kind == "raw")
    traces = [None if e.trace is None else e.trace.removeprefix(template.prefill) for e in examples]
    encoded = iter(_encode(tokenizer, [trace for trace in traces if trace is not None], add_special_tokens=False))
    prompts = []
    for example, text, ids, trace in zip(examples, texts, prompt_ids, traces, strict=True):
        trace_ids = None if trace is None else next(encoded)
        if trace is not None and example.trace_ids is not None:
            trace, trace_ids = example.trace, _own_tokens(path, example, tokenizer)
        if trace_ids is not None:
            trace_ids = _end_with_eos(trace_ids, eos_token_id(tokenizer))
        prompts.append(Prompt(example.number - 1, example.problem, example.answer, text, ids, trace, trace_ids))
    return prompts


def _own_tokens(path: Path, example: _Example, tokenizer: Tokenizer) -> np.ndarray:
    """The tokens as they were sampled; tokenising their text again may give others."""
    ids = example.trace_ids
    if not isinstance(ids, list) or max(ids, default=-1) >= len(tokenizer) or min(ids, default=0) < 0:
        text = None
    else:
        text = tokenizer.decode(ids, skip_special_tokens=True)
    if text != example.trace:
        raise RowError(
            path, example.number,
            f"its {TRACE_IDS_COLUMN} are not its {TRACE_IDS_OF} under the student's tokenizer; make the traces anew, "
            f"or remove the column {TRACE_IDS_COLUMN} to tokenise the text",
        )  # fmt: skip
    return np.asarray(ids, dtype=np.int32)


def _encode(tokenizer: Tokenizer, texts: list[str], *, add_special_tokens: bool) -> list[np.ndarray]:
    if not texts:
        return []
    encoding = tokenizer(texts, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False)
    return [np.asarray(ids, dtype=np.int32) for ids in encoding["input_ids"]]


def _end_with_eos(ids: np.ndarray, eos: int) -> np.ndarray:
    return ids if len(ids) and ids[-1] == eos else np.append(ids, np.int32(eos))


def _misfit(prompt: Prompt, max_prompt_tokens: int, max_sequence_length: int) -> str | None:
    """Why a prompt cannot be used, ending with the limit that it breaks."""
    prompt_tokens = len(prompt.token_ids)
    if prompt_tokens > max_prompt_tokens:
        return f"the prompt has {prompt_tokens} tokens, max_sequence_length leaves room for {max_prompt_tokens}"
    if prompt.trace_ids is not None and prompt_tokens + len(prompt.trace_ids) > max_sequence_length:
        total = prompt_tokens + len(prompt.trace_ids)
        return f"prompt and trace have {total} tokens, more than max_sequence_length={max_sequence_length}"
    return None
