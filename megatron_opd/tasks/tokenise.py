"""The tasks of examples: rendered by the template, with the student's tokens."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_opd.architectures.ends import Ends
from megatron_opd.contracts.rows import Task
from megatron_opd.errors import DataError
from megatron_opd.recipe.data import DataConfig
from megatron_opd.tasks.examples import TRACE_IDS_COLUMN, TRACE_IDS_OF, Example
from megatron_opd.tasks.template import render, without_opening
from megatron_opd.tasks.tokenizer import Tokenizer, ends_of


def tokenise(examples: tuple[Example, ...], config: DataConfig, tokenizer: Tokenizer) -> list[Task]:
    """The task of each example, with the tokens of its trace. Raises RowError."""
    template = config.template
    texts = [_render(example, config, tokenizer) for example in examples]
    # A chat template writes the special tokens itself.
    prompt_ids = _encode(tokenizer, texts, examples, add_special_tokens=template.kind == "raw")
    traces = []
    for example, text in zip(examples, texts, strict=True):
        traces.append(without_opening(example.trace or "", text, template.prefill))
    traces_ids = _encode(tokenizer, traces, examples, add_special_tokens=False)
    # Without traces a tokenizer need not name an end.
    has_traces = any(example.trace is not None for example in examples)
    ends = ends_of(tokenizer) if has_traces else Ends((), -1)
    tasks = []
    for example, text, ids, trace, trace_ids in zip(
        examples, texts, prompt_ids, traces, traces_ids, strict=True
    ):
        if len(ids) == 0:
            raise example.error(
                f"the prompt has no token in {tokenizer.name_or_path}'s tokenizer; remove the row"
            )
        task = Task(
            example.index, example.problem.text, example.answer, text, ids,
            source=example.source, columns=example.columns, level=example.level,
        )  # fmt: skip
        if example.trace is not None and example.trace_ids is not None:
            own_ids = _own_tokens(example, tokenizer, ends)
            task = replace(task, trace=example.trace, trace_ids=_ended(own_ids, ends))
        elif example.trace is not None:
            task = replace(task, trace=trace, trace_ids=_ended(trace_ids, ends))
        tasks.append(task)
    return tasks


def _render(example: Example, config: DataConfig, tokenizer: Tokenizer) -> str:
    try:
        return render(config.template, tokenizer, example.problem.text, example.problem.before)
    except DataError as error:
        raise example.error(str(error)) from error


def _own_tokens(example: Example, tokenizer: Tokenizer, ends: Ends) -> np.ndarray:
    """The tokens of a trace that were sampled; tokenising its text again may give others."""
    ids = example.trace_ids
    text = None
    size = len(tokenizer)
    if isinstance(ids, list) and all(type(i) is int and 0 <= i < size for i in ids):
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
    examples: Sequence[Example],
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
    except Exception as error:
        # tokenizers raises it for a character that the vocabulary lacks without a token for that.
        if len(texts) > 1:
            for text, example in zip(texts, examples, strict=True):
                _encode(tokenizer, [text], [example], add_special_tokens=add_special_tokens)
        raise examples[0].error(
            f"the tokenizer of {tokenizer.name_or_path} cannot read the text ({error})"
        ) from error
    return [np.asarray(ids, dtype=np.int32) for ids in encoding["input_ids"]]


def _ended(ids: np.ndarray, ends: Ends) -> np.ndarray:
    """The tokens, ended by one at which the student's engine stops."""
    return ids if len(ids) and ids[-1] in ends.ids else np.append(ids, np.int32(ends.first))
