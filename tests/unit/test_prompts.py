"""Prompts: templates, data files and their errors."""

import json
import logging
import subprocess
import sys
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from megatron_opd.contracts.rows import Task
from megatron_opd.errors import ConfigError, DataError
from megatron_opd.recipe.data import DataConfig, TemplateConfig
from megatron_opd.tasks.data import load_tasks
from megatron_opd.tasks.template import render
from megatron_opd.tasks.tokenizer import load_tokenizer
from tests.unit.byte_tokenizer import write_byte_tokenizer

RAW = DataConfig(train="", template=TemplateConfig(kind="raw"))
CHAT = DataConfig(train="", template=TemplateConfig())
DAPO_ROW = {
    "data_source": "math_dapo",
    "prompt": [{"role": "user", "content": "Solve: 1+1"}],
    "reward_model": {"ground_truth": "2", "style": "rule-lighteval/MATH_v2"},
    "extra_info": {"index": "a"},
}
OPENR1_ROW = {
    "problem": "What is {x}^2 at x=3?",
    "solution": "Square it.",
    "answer": "9",
    "generations": ["it is 8", "it is 9", "nine"],
    "correctness_math_verify": [False, True, True],
    "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Any:
    return load_tokenizer(model_dir)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path: Path, config: DataConfig, tokenizer: Any, **changes: Any) -> list[Task]:
    limits = {
        "max_prompt_tokens": 1000,
        "max_sequence_length": 1500,
        "need_answer": True,
        "need_trace": False,
    }
    return load_tasks(path, config, tokenizer, **(limits | changes))


# ------------------------------------------------------------------------------ tokenizer, template
def test_a_missing_or_broken_model_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such model directory"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=f"{tmp_path}: cannot load a tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    # of this class transformers makes an empty tokenizer, which reads every text as no token
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(DataError, match=f"{tmp_path}: holds no tokenizer; copy tokenizer.json"):
        load_tokenizer(tmp_path)


def test_rendering(tokenizer: Any) -> None:
    problem = r"Find \frac{1}{2} of {problem} and {0}"
    raw = TemplateConfig(kind="raw", text="Q: {problem}\nA:", prefill=" <think>\n")
    assert render(raw, tokenizer, problem) == f"Q: {problem}\nA: <think>\n"
    chat = TemplateConfig(text="{problem} Box it.")
    assert render(chat, tokenizer, problem) == f"<user>{problem} Box it.</s><assistant>"
    assert render(replace(chat, system="Be brief."), tokenizer, "x").startswith(
        "<system>Be brief.</s><user>x"
    )
    tgpo = render(TemplateConfig(system="tgpo", prefill="<think>\n"), tokenizer, "x")
    assert tgpo.startswith(
        "<system>Your task is to follow a systematic, thorough reasoning process"
    )
    assert r"answer in \boxed{} for closed-form results" in tgpo and tgpo.endswith(
        "<assistant><think>\n"
    )


def test_a_chat_template_that_is_missing_or_fails_names_the_remedy(model_dir: Path) -> None:
    tokenizer = load_tokenizer(model_dir)
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(DataError, match=r"no system role.*data\.template\.kind=raw"):
        render(TemplateConfig(), tokenizer, "x")
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"no chat template; set data\.template\.kind=raw"):
        render(TemplateConfig(), tokenizer, "x")


# --------------------------------------------------------------------------------------- data files
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_numbers_are_answers_in_digits(tmp_path: Path, tokenizer: Any, suffix: str) -> None:
    gold = {
        0.00001: "0.00001",
        1e22: "1" + "0" * 22,
        2.5e-07: "0.00000025",
        142.0: "142.0",
        -0.5: "-0.5",
    }
    rows = [{"prompt": "q", "answer": number} for number in gold]
    tasks = load(write(tmp_path / f"data{suffix}", rows), RAW, tokenizer)
    assert [p.answer for p in tasks] == list(gold.values())


def test_big_integers_and_decimals_keep_every_digit(tmp_path: Path, tokenizer: Any) -> None:
    digits = "123456789012345678901234567890"
    (task,) = load(
        write(tmp_path / "a.jsonl", [{"prompt": "q", "answer": int(digits)}]), RAW, tokenizer
    )
    assert task.answer == digits
    rows = [
        {"prompt": "q", "answer": Decimal("0.10")},
        {"prompt": "q", "answer": Decimal("12345678901234567.89")},
    ]
    tasks = load(write(tmp_path / "a.parquet", rows), RAW, tokenizer)
    assert [p.answer for p in tasks] == ["0.10", "12345678901234567.89"]


@pytest.mark.parametrize(
    "missing", ["NaN", "Infinity", "-Infinity", "1e999", '"nan"', '"None"', '"null"', '"inf"']
)
def test_a_number_that_is_not_finite_is_a_missing_answer(
    tmp_path: Path, tokenizer: Any, missing: str
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f'{{"prompt": "p", "answer": 1}}\n{{"prompt": "q", "answer": {missing}}}\n')
    with pytest.raises(DataError, match=r"data\.jsonl:2: no answer in column answer"):
        load(path, RAW, tokenizer)


def test_a_missing_number_of_a_table_is_a_missing_answer(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": "p", "answer": 42.0}, {"prompt": "q", "answer": float("nan")}]
    with pytest.raises(DataError, match=r"data\.parquet:2: no answer in column answer"):
        load(write(tmp_path / "data.parquet", rows), RAW, tokenizer)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("row", "problem", "answer"),
    [
        ({"prompt": "1+1?", "answer": 2}, "1+1?", "2"),
        ({"question": "1+1?", "answer": " 2 "}, "1+1?", "2"),
        ({"prompt": "1+1?", "solution": "2"}, "1+1?", "2"),
        (OPENR1_ROW, "What is {x}^2 at x=3?", "9"),
        (DAPO_ROW, "Solve: 1+1", "2"),
    ],
)
def test_layouts(
    tmp_path: Path, tokenizer: Any, suffix: str, row: dict[str, Any], problem: str, answer: str
) -> None:
    tasks = load(write(tmp_path / f"data{suffix}", [row, row]), CHAT, tokenizer)
    assert [p.index for p in tasks] == [0, 1]
    for task in tasks:
        assert (task.problem, task.answer) == (problem, answer)
        assert task.text == f"<user>{problem}</s><assistant>"
        assert task.prompt_ids.dtype == np.int32 and tokenizer.decode(task.prompt_ids) == task.text
        assert task.trace is None and task.trace_ids is None


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("row", "trace"),
    [
        ({"problem": "p", "response": "so 2"}, "so 2"),
        ({"problem": "p", "response": "so 2</s>"}, "so 2</s>"),
        (OPENR1_ROW, "it is 9"),
        (
            OPENR1_ROW
            | {"correctness_math_verify": [False] * 3, "correctness_llama": [False, False, True]},
            "nine",
        ),
        ({"problem": "p", "generations": ["one", "two"]}, "one"),
        (DAPO_ROW | {"target": [{"role": "assistant", "content": "It is 2."}]}, "It is 2."),
    ],
)
def test_traces_end_with_one_eos(
    tmp_path: Path, tokenizer: Any, suffix: str, row: dict[str, Any], trace: str
) -> None:
    path = write(tmp_path / f"data{suffix}", [row])
    (task,) = load(path, RAW, tokenizer, need_answer=False, need_trace=True)
    assert task.trace_ids is not None and task.trace_ids.dtype == np.int32
    assert task.trace == trace
    assert tokenizer.decode(task.trace_ids) == trace.removesuffix("</s>") + "</s>"


def test_a_trace_keeps_its_own_tokens_and_they_must_be_the_students(
    tmp_path: Path, tokenizer: Any
) -> None:
    """Sampled tokens need not be those that the text is tokenised to: here one of them does not
    show in it."""
    spelled = tokenizer("so 2", add_special_tokens=False)["input_ids"]
    spelled.insert(1, tokenizer.eos_token_id)
    row = {"problem": "p", "response": "so 2", "token_ids": spelled}
    (task,) = load(
        write(tmp_path / "a.parquet", [row]), RAW, tokenizer, need_answer=False, need_trace=True
    )
    assert task.trace_ids is not None and task.trace_ids.tolist() == [
        *spelled,
        tokenizer.eos_token_id,
    ]
    for wrong in (spelled[::-1], [*spelled[:-1], 10**6], [-1]):
        path = write(tmp_path / "b.parquet", [row, row | {"token_ids": wrong}])
        with pytest.raises(
            DataError, match=r"b\.parquet:2: its token_ids are not its response under the student's"
        ):
            load(path, RAW, tokenizer, need_answer=False, need_trace=True)
    load(path, RAW, tokenizer, need_answer=False, need_trace=False)


def test_a_trace_goes_on_where_the_prefill_ends(tmp_path: Path, tokenizer: Any) -> None:
    path = write(
        tmp_path / "data.jsonl",
        [{"problem": "p", "response": "<think>\nhm"}, {"problem": "p", "response": "x"}],
    )
    config = replace(RAW, template=TemplateConfig(kind="raw", prefill="<think>\n"))
    first, second = load(path, config, tokenizer, need_answer=False, need_trace=True)
    assert first.trace_ids is not None and second.trace_ids is not None
    assert tokenizer.decode([*first.prompt_ids, *first.trace_ids]) == "p<think>\nhm</s>"
    assert tokenizer.decode([*second.prompt_ids, *second.trace_ids]) == "p<think>\nx</s>"


def test_columns_named_in_the_recipe(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "data.jsonl", [{"prompt": "no", "q": "yes", "gold": {"value": 0.5}}])
    (task,) = load(path, replace(RAW, problem_column="q", answer_column="gold.value"), tokenizer)
    assert (task.problem, task.answer) == ("yes", "0.5")


def test_blank_lines_keep_the_row_numbers_of_an_editor(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('\n{"prompt": "a", "answer": "1"}\n\n{"prompt": "b", "answer": "2"}\n')
    assert [p.index for p in load(path, RAW, tokenizer)] == [1, 3]


GOOD = '{"problem": "p", "answer": "1"}\n'


@pytest.mark.parametrize(
    ("name", "content", "need_trace", "message"),
    [
        ("data.jsonl", None, False, r"data\.jsonl: no such file; check data\.train"),
        (
            "data.csv",
            b"a,b",
            False,
            r"unknown kind of file '\.csv'; give a \.jsonl or a \.parquet file",
        ),
        ("data.jsonl", b"", False, r"data\.jsonl: the file has no rows"),
        ("data.jsonl", b"\n\n", False, r"the file has no rows"),
        ("data.parquet", b"not parquet", False, r"data\.parquet: not a Parquet file"),
        ("data.jsonl", GOOD + '{"problem": "p"', False, r"data\.jsonl:2: not valid JSON"),
        ("data.jsonl", b'{"problem": "\xff"}', False, r"data\.jsonl:1: not valid JSON"),
        ("data.jsonl", "[" * 100_000, False, r"data\.jsonl:1: not valid JSON"),
        ("data.jsonl", GOOD + "[1]", False, r"data\.jsonl:2: a JSON list"),
        (
            "data.jsonl",
            '{"text": "p", "answer": "1"}',
            False,
            r"no column prompt \| .* \| conversations among those found \(text, answer\); "
            r"set data\.problem_column",
        ),
        (
            "data.jsonl",
            '{"problem": "p", "gold": "1"}',
            False,
            r"found \(problem, gold\); set data\.answer_column",
        ),
        ("data.jsonl", GOOD, True, r"found \(problem, answer\); set data\.trace_column"),
        (
            "data.jsonl",
            GOOD + '{"problem": "p"}',
            False,
            r"data\.jsonl:2: no answer in column answer",
        ),
        (
            "data.jsonl",
            GOOD + '{"problem": "p", "answer": " "}',
            False,
            r"data\.jsonl:2: no answer",
        ),
        (
            "data.jsonl",
            GOOD + '{"problem": "p", "answer": null}',
            False,
            r"data\.jsonl:2: no answer",
        ),
        (
            "data.jsonl",
            GOOD + '{"problem": "", "answer": "1"}',
            False,
            r"data\.jsonl:2: no problem text",
        ),
        (
            "data.jsonl",
            '{"prompt": [{"role": "x"}], "answer": "1"}',
            False,
            r"data\.jsonl:1: no problem text",
        ),
        (
            "data.jsonl",
            '{"problem": "p", "answer": "1", "generations": ["a"], '
            '"correctness_math_verify": [false]}',
            True,
            r"data\.jsonl:1: no \(verified\) trace in column generations",
        ),
    ],
)
def test_bad_files_are_one_line_with_row_and_remedy(
    tmp_path: Path,
    tokenizer: Any,
    name: str,
    content: str | bytes | None,
    need_trace: bool,
    message: str,
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=message) as caught:
        load(path, RAW, tokenizer, need_trace=need_trace)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_an_empty_parquet_file(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table({"problem": pyarrow.array([], pyarrow.string())}), path
    )
    with pytest.raises(DataError, match="the file has no rows"):
        load(path, RAW, tokenizer)


def test_long_rows_are_errors_or_dropped_and_counted(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"problem": "p" * n, "answer": "1", "response": "r" * n} for n in (4, 9, 5)]
    path = write(tmp_path / "data.jsonl", rows)
    assert len(load(path, RAW, tokenizer, max_prompt_tokens=9)) == 3
    with pytest.raises(
        DataError, match=r"data\.jsonl:2: the prompt has 9 tokens, .* 8; .* data\.long_prompts=drop"
    ):
        load(path, RAW, tokenizer, max_prompt_tokens=8)
    drop = replace(RAW, long_prompts="drop")
    with caplog.at_level(logging.WARNING):
        assert [p.index for p in load(path, drop, tokenizer, max_prompt_tokens=8)] == [0, 2]
    assert "dropped 1 of 3 rows" in caplog.text
    with pytest.raises(DataError, match="all 3 rows are too long"):
        load(path, drop, tokenizer, max_prompt_tokens=3)
    with pytest.raises(
        DataError, match=r":2: prompt and trace have 19 tokens, more than max_sequence_length=18"
    ):
        load(path, RAW, tokenizer, max_sequence_length=18, need_trace=True)
    assert len(load(path, RAW, tokenizer, max_sequence_length=19, need_trace=True)) == 3


def test_a_template_without_the_problem_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    config = replace(RAW, template=TemplateConfig(kind="raw", text="Solve {it}"))
    with pytest.raises(ConfigError, match=r"data\.template\.text"):
        load(tmp_path / "data.jsonl", config, tokenizer)


def test_more_rows_than_one_tokeniser_call(tmp_path: Path, tokenizer: Any) -> None:
    path = write(
        tmp_path / "data.parquet", [{"problem": f"p{i}", "answer": str(i)} for i in range(2345)]
    )
    tasks = load(path, RAW, tokenizer)
    assert [p.index for p in tasks] == list(range(2345))
    assert all(tokenizer.decode(p.prompt_ids) == p.problem == f"p{p.answer}" for p in tasks)


def test_importing_the_station_is_cheap() -> None:
    code = (
        "import sys, megatron_opd.tasks.data, megatron_opd.tasks.source\n"
        "assert not {'torch', 'transformers', 'pyarrow', 'vllm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
