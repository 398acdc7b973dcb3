"""Data files -> prompts."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import batched, chain, islice
from pathlib import Path

import numpy as np

from megatron_opd.architectures.ends import Ends
from megatron_opd.contracts.rows import Prompt
from megatron_opd.errors import ConfigError, DataError
from megatron_opd.recipe.keys import DataConfig, RunConfig
from megatron_opd.tasks.data_files import data_files
from megatron_opd.tasks.fields import (
    Fields,
    choose_columns,
    read_answer,
    read_problem,
    read_trace,
    verified_columns,
)
from megatron_opd.tasks.messages import BadField, Problem
from megatron_opd.tasks.notes import Notes
from megatron_opd.tasks.rows import (
    BadRows,
    NumberedRow,
    Row,
    RowError,
    json_columns,
    parquet_columns,
    read_json,
    read_parquet,
)
from megatron_opd.tasks.template import chat_template_of, render, without_opening
from megatron_opd.tasks.tokenizer import Tokenizer, ends_of

logger = logging.getLogger(__name__)

TRACE_IDS_OF, TRACE_IDS_COLUMN = "response", "token_ids"  # as `megatron-opd traces` writes them
TOKENISE_ROWS = 1000  # per call of the tokenizer
# the first rows of a JSON file, whose columns are taken for all that it has
_ROWS_WITH_ALL_COLUMNS = 100


@dataclass(frozen=True)
class _Example:
    """A row's fields; number counts from 1 in its file, index from 0 over all files."""

    path: Path
    number: int
    index: int
    problem: Problem
    answer: str
    trace: str | None
    trace_ids: object  # the trace's own tokens, from a file of `megatron-opd traces`

    def error(self, what: str) -> RowError:
        return RowError(self.path, self.number, what)


def load_training(
    config: RunConfig,
    tokenizer: Tokenizer,
    *,
    need_answer: bool,
    need_trace: bool,
    warn: Callable[[str], None] = logger.warning,
) -> list[Prompt]:
    """The recipe's training prompts."""
    return load_prompts(
        config.data.train,
        config.data,
        tokenizer,
        max_prompt_tokens=_max_prompt_tokens(config),
        max_sequence_length=config.max_sequence_length,
        need_answer=need_answer,
        need_trace=need_trace,
        warn=warn,
    )


def load_heldout(
    config: RunConfig, tokenizer: Tokenizer, warn: Callable[[str], None] = logger.warning
) -> list[Prompt]:
    """The recipe's held-out prompts: the first `eval.num_prompts` of them, or all."""
    heldout = config.data.heldout_set
    assert heldout is not None
    columns = replace(
        config.data, problem_column=heldout.problem_column, answer_column=heldout.answer_column
    )
    prompts = load_prompts(
        heldout.path,
        columns,
        tokenizer,
        key="data.heldout",
        max_prompt_tokens=_max_prompt_tokens(config),
        max_sequence_length=config.max_sequence_length,
        need_answer=True,
        need_trace=False,
        warn=warn,
    )
    count = config.eval.num_prompts if config.eval else 0
    return prompts[: count or None]


def load_prompts(
    paths: str | Path | list[str],
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    key: str = "data.train",
    max_prompt_tokens: int,
    max_sequence_length: int,
    need_answer: bool,
    need_trace: bool,
    warn: Callable[[str], None] = logger.warning,
) -> list[Prompt]:
    """Read, check, render and tokenise data files. No torch: the pre-flight check calls it too.

    `Prompt.index` is the row number from 0, over all files. With `need_trace`, `trace_ids` are the
    trace's tokens and an end; a trace that repeats how the prompt ends, with `template.prefill` or
    `<think>`, continues after it. Rows that cannot be read, and those that do not fit, are errors,
    or dropped and counted, as `data.bad_rows` and `data.long_prompts` say. `warn` gets a line for
    what is odd about the rows.

    Raises DataError with the file, the row and the remedy.
    """
    if "{problem}" not in config.template.text:
        raise ConfigError(
            "data.template.text: has no {problem}, so every prompt would be the same; put it in"
        )
    if config.template.kind == "chat":
        chat_template_of(tokenizer)  # where there is none, no row is to blame
    bad_rows, notes = BadRows(config.bad_rows), Notes(config.template)
    files = data_files(paths if isinstance(paths, list) else str(paths), key)
    examples = _read_files(
        files, config, key, bad_rows, need_answer=need_answer, need_trace=need_trace
    )
    prompts, too_long = [], 0
    for batch in batched(examples, TOKENISE_ROWS):
        for example, prompt in zip(batch, _tokenise(batch, config, tokenizer), strict=True):
            problem = _misfit(prompt, config, max_prompt_tokens, max_sequence_length)
            if problem is None:
                prompts.append(prompt)
                notes.add(prompt, example.problem.before, f"{example.path}:{example.number}")
            elif config.long_prompts == "error":
                raise example.error(f"{problem}; raise it or set data.long_prompts=drop")
            else:
                too_long += 1
    rows = len(prompts) + too_long + bad_rows.count
    if not prompts:
        bad_rows.raise_first()
        raise DataError(f"{files[0]}: all {too_long} rows are too long; raise max_sequence_length")
    bad_rows.warn(rows, warn)
    if too_long:
        warn(f"{key}: dropped {too_long} of {rows} rows that are too long")
    notes.warn(key, warn)
    return prompts


def _max_prompt_tokens(config: RunConfig) -> int:
    return min(
        config.data.max_prompt_tokens or config.max_sequence_length, config.max_sequence_length - 1
    )


def _read_files(
    files: Sequence[Path],
    config: DataConfig,
    key: str,
    bad_rows: BadRows,
    *,
    need_answer: bool,
    need_trace: bool,
) -> Iterator[_Example]:
    before = 0  # rows of the files ahead
    for path in files:
        last = 0
        columns, found, rows = _open(
            path, config, key, need_answer=need_answer, need_trace=need_trace
        )
        own_tokens = columns.trace == TRACE_IDS_OF and TRACE_IDS_COLUMN in found
        for number, row in rows:
            last = number
            try:
                if isinstance(row, RowError):
                    raise row
                trace_ids = row.get(TRACE_IDS_COLUMN, ()) if own_tokens else None
                fields = _read_fields(row, columns, need_answer=need_answer, need_trace=need_trace)
                yield _Example(path, number, before + number - 1, *fields, trace_ids)
            except RowError as error:
                bad_rows.add(error)
            except BadField as error:
                bad_rows.add(RowError(path, number, str(error)))
        before += last


def _open(
    path: Path, config: DataConfig, key: str, *, need_answer: bool, need_trace: bool
) -> tuple[Fields, list[str], Iterator[NumberedRow]]:
    """The columns to read of a file, those that it has, and its rows."""
    if path.suffix == ".parquet":
        found = parquet_columns(path)
        columns = choose_columns(
            path, found, config, key, need_answer=need_answer, need_trace=need_trace
        )
        further = (
            [TRACE_IDS_COLUMN]
            if columns.trace == TRACE_IDS_OF and TRACE_IDS_COLUMN in found
            else []
        )
        further += verified_columns(found) if need_trace else []
        return columns, found, read_parquet(path, [*columns.to_read(found), *further])
    rows = read_json(path)
    first = list(islice(rows, _ROWS_WITH_ALL_COLUMNS))
    found = json_columns(path, first)
    columns = choose_columns(
        path, found, config, key, need_answer=need_answer, need_trace=need_trace
    )
    return columns, found, chain(first, rows)


def _read_fields(
    row: Row, columns: Fields, *, need_answer: bool, need_trace: bool
) -> tuple[Problem, str, str | None]:
    """Problem, answer and trace. Raises BadField."""
    problem = read_problem(row, columns)
    answer = read_answer(row, columns)
    trace = read_trace(row, columns)
    if need_answer and answer is None:
        raise BadField(f"no answer in column {columns.answer}; fill it or remove the row")
    if need_trace and trace is None:
        raise BadField(f"no (verified) trace in column {columns.trace}; fill it or remove the row")
    texts = [problem.text, answer, trace, *(message["content"] for message in problem.before)]
    for text in texts:
        if isinstance(text, str):
            _check_characters(text)
    return problem, answer or "", trace


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise BadField(
            f"{half} is half a character (a lone surrogate); mend it or remove the row"
        ) from None
    if "\0" in text:
        raise BadField("a NUL character in the text; mend it or remove the row")


def _tokenise(
    examples: tuple[_Example, ...], config: DataConfig, tokenizer: Tokenizer
) -> list[Prompt]:
    template = config.template
    texts = [_render(example, config, tokenizer) for example in examples]
    # A chat template writes the special tokens itself.
    prompt_ids = _encode(tokenizer, texts, examples, add_special_tokens=template.kind == "raw")
    traces = [
        without_opening(e.trace or "", text, template.prefill)
        for e, text in zip(examples, texts, strict=True)
    ]
    traces_ids = _encode(tokenizer, traces, examples, add_special_tokens=False)
    # Without traces a tokenizer need not name an end.
    ends = (
        ends_of(tokenizer)
        if any(example.trace is not None for example in examples)
        else Ends((), -1)
    )
    prompts = []
    for example, text, ids, trace, trace_ids in zip(
        examples, texts, prompt_ids, traces, traces_ids, strict=True
    ):
        if len(ids) == 0:
            raise example.error(
                f"the prompt has no token in {tokenizer.name_or_path}'s tokenizer; remove the row"
            )
        prompt = Prompt(example.index, example.problem.text, example.answer, text, ids)
        if example.trace is not None and example.trace_ids is not None:
            own_ids = _own_tokens(example, tokenizer, ends)
            prompt = replace(prompt, trace=example.trace, trace_ids=_ended(own_ids, ends))
        elif example.trace is not None:
            prompt = replace(prompt, trace=trace, trace_ids=_ended(trace_ids, ends))
        prompts.append(prompt)
    return prompts


def _render(example: _Example, config: DataConfig, tokenizer: Tokenizer) -> str:
    try:
        return render(config.template, tokenizer, example.problem.text, example.problem.before)
    except DataError as error:
        raise example.error(str(error)) from error


def _own_tokens(example: _Example, tokenizer: Tokenizer, ends: Ends) -> np.ndarray:
    """The tokens as they were sampled; tokenising their text again may give others."""
    ids, text = example.trace_ids, None
    if isinstance(ids, list) and all(
        type(token) is int and 0 <= token < len(tokenizer) for token in ids
    ):
        written = ids[:-1] if ids and ids[-1] in ends.ids else ids
        text = tokenizer.decode(written, skip_special_tokens=True)
    if text != example.trace:
        raise example.error(
            f"its {TRACE_IDS_COLUMN} are not its {TRACE_IDS_OF} under the student's tokenizer; "
            f"make the traces anew, or remove the column {TRACE_IDS_COLUMN} to tokenise the text"
        )
    return np.asarray(ids, dtype=np.int32)


def _encode(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    examples: Sequence[_Example],
    *,
    add_special_tokens: bool,
) -> list[np.ndarray]:
    """The tokens of texts that belong to these examples."""
    if not any(texts):
        return [np.zeros(0, np.int32)] * len(texts)
    settings = {
        "add_special_tokens": add_special_tokens,
        "return_attention_mask": False,
        "verbose": False,
    }
    try:
        encoding = tokenizer(list(texts), **settings)
    except Exception as error:  # what tokenizers raises: a character that the vocabulary lacks, without a token for it
        if len(texts) > 1:
            for text, example in zip(texts, examples, strict=True):
                _encode(tokenizer, [text], [example], add_special_tokens=add_special_tokens)
        raise examples[0].error(
            f"the tokenizer of {tokenizer.name_or_path} cannot read the text ({error})"
        ) from error
    return [np.asarray(ids, dtype=np.int32) for ids in encoding["input_ids"]]


def _ended(ids: np.ndarray, ends: Ends) -> np.ndarray:
    """With a last token at which the student's engine stops."""
    return ids if len(ids) and ids[-1] in ends.ids else np.append(ids, np.int32(ends.first))


def _misfit(
    prompt: Prompt, config: DataConfig, max_prompt_tokens: int, max_sequence_length: int
) -> str | None:
    """Why a prompt cannot be used, ending with the limit that it breaks."""
    prompt_tokens = len(prompt.token_ids)
    if prompt_tokens > max_prompt_tokens and max_prompt_tokens == config.max_prompt_tokens:
        return f"the prompt has {prompt_tokens} tokens, more than data.max_prompt_tokens={max_prompt_tokens}"
    if prompt_tokens > max_prompt_tokens:
        return f"the prompt has {prompt_tokens} tokens, max_sequence_length leaves room for {max_prompt_tokens}"
    if prompt.trace_ids is not None and prompt_tokens + len(prompt.trace_ids) > max_sequence_length:
        total = prompt_tokens + len(prompt.trace_ids)
        return f"prompt and trace have {total} tokens, more than max_sequence_length={max_sequence_length}"
    return None
