"""Data files of every kind and damage: prompts, or one line with the file, the row and the
remedy."""

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import normalizers

from megatron_opd.checks.training import check_data
from megatron_opd.contracts.rows import Task
from megatron_opd.errors import DataError
from megatron_opd.files import rows as rows_module
from megatron_opd.recipe.data import DataConfig, HeldoutConfig, TemplateConfig
from megatron_opd.recipe.keys import RunConfig
from megatron_opd.recipe.load import load_config
from megatron_opd.tasks.data import load_heldout, load_tasks
from megatron_opd.tasks.data_files import changed_data, data_files, data_sha256
from megatron_opd.tasks.tokenizer import load_tokenizer
from tests.tiny_config import tiny_config
from tests.unit.byte_tokenizer import write_byte_tokenizer
from tests.unit.tiny_model_files import write_recipe

CHAT = DataConfig(train="")
GOOD = {"problem": "1+1?", "answer": "2"}
LINE = json.dumps(GOOD).encode() + b"\n"
USER = {"role": "user", "content": "1+1?"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(write_byte_tokenizer(tmp_path_factory.mktemp("model")))


def load(paths: Any, tokenizer: Any, config: DataConfig = CHAT, **changes: Any) -> list[Task]:
    limits = {
        "max_prompt_tokens": 1000,
        "max_sequence_length": 1500,
        "need_answer": True,
        "need_trace": False,
    }
    return load_tasks(paths, config, tokenizer, **(limits | changes))


def write(path: Path, *rows: object) -> Path:
    """Rows as lines, or as a Parquet table; text is a line as it is."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    else:
        path.write_text(
            "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
        )
    return path


def parquet(**columns: Any) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue().to_pybytes()


def two_columns_of_one_name() -> bytes:
    sink = pyarrow.BufferOutputStream()
    column = pyarrow.array(["1"])
    pyarrow.parquet.write_table(
        pyarrow.Table.from_arrays([column, column], ["problem", "problem"]), sink
    )
    return sink.getvalue().to_pybytes()


def not_utf8() -> Any:
    """A column whose second text is not UTF-8, as other writers leave it."""
    offsets = pyarrow.array([0, 1, 3, 4], pyarrow.int32()).buffers()[1]
    return pyarrow.StringArray.from_buffers(3, offsets, pyarrow.py_buffer(b"a\xff\xfeb"))


def task(value: object) -> bytes:
    """A good row, and one with this prompt."""
    return (
        LINE.replace(b"problem", b"prompt") + json.dumps({"prompt": value, "answer": "2"}).encode()
    )


PARQUET = parquet(problem=["a", "b"], answer=["1", "2"])
GZIP = gzip.compress(LINE * 50)

# name, bytes, and the number of prompts or what the line says
FILES: list[tuple[str, bytes, int | str]] = [
    # ----------------------------------------------------------------------------- files as a whole
    (
        "a.csv",
        b"problem,answer",
        r"a\.csv: unknown kind of file '\.csv'; give a \.jsonl .* \(or a \.json,",
    ),
    ("a", LINE, r"a: unknown kind of file ''"),
    ("a.jsonl", b"", r"a\.jsonl: the file has no rows"),
    ("a.jsonl", b"\n \r\n\t\n", r"a\.jsonl: the file has no rows"),
    ("a.jsonl", b"\xef\xbb\xbf", r"a\.jsonl: the file has no rows"),
    ("a.jsonl", b"\xef\xbb\xbf" + LINE, 1),
    ("a.jsonl", LINE + b"\xef\xbb\xbf" + LINE, 2),
    ("a.jsonl", LINE.replace(b"\n", b"\r\n") * 2, 2),
    ("a.jsonl", LINE.replace(b"\n", b"\r") * 2, r"a\.jsonl:1: not valid JSON \(Extra data"),
    ("a.jsonl", LINE.strip(), 1),
    (
        "a.jsonl",
        LINE.decode().encode("utf-16"),
        r"a\.jsonl:1: text in UTF-16; save the file as UTF-8",
    ),
    ("a.jsonl", b"\xfe\xff" + LINE.decode().encode("utf-16-be"), r"a\.jsonl:1: text in UTF-16"),
    (
        "a.jsonl",
        LINE + b'{"problem": "caf\xe9", "answer": "2"}',
        r"a\.jsonl:2: not valid JSON \('utf-8'",
    ),
    ("a.jsonl", b"\0" * 100, r"a\.jsonl:1: not valid JSON"),
    ("a.jsonl", LINE + b"\0" * 100, r"a\.jsonl:2: not valid JSON"),
    # ---------------------------------------------------------------------------------------- lines
    ("a.jsonl", LINE + LINE[:-8], r"a\.jsonl:2: not valid JSON \(Unterminated"),
    ("a.jsonl", LINE + b'{"problem": "a",}', r"a\.jsonl:2: not valid JSON"),
    ("a.jsonl", b"{'problem': 'a'}", r"a\.jsonl:1: not valid JSON"),
    ("a.jsonl", LINE + b'["a"]', r"a\.jsonl:2: a JSON list; every row must be one JSON object"),
    ("a.jsonl", LINE + b'"a"', r"a\.jsonl:2: a JSON str"),
    ("a.jsonl", LINE + b"null", r"a\.jsonl:2: a JSON NoneType"),
    ("a.jsonl", json.dumps([GOOD], indent=1).encode(), r"a\.jsonl:1: not valid JSON"),
    ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: not valid JSON"),
    (
        "a.jsonl",
        b'{"problem": "a", "answer": ' + b"9" * 5000 + b"}",
        r"a\.jsonl:1: not valid JSON \(Exceeds",
    ),
    ("a.jsonl", b'{"problem": "a", "answer": "2", "score": NaN}', 1),
    ("a.jsonl", LINE + b"{}", r"a\.jsonl:2: no problem text"),
    (
        "a.jsonl",
        b'{"text": "a"}',
        r"a\.jsonl: no column prompt .* \(text\); set data\.problem_column",
    ),
    ("a.jsonl", b'{"te\\nxt": "a"}', r"a\.jsonl: no column prompt .* \('te\\nxt'\)"),
    # ----------------------------------------------------------------------------------- characters
    (
        "a.jsonl",
        LINE + b'{"problem": "a\\ud835", "answer": "2"}',
        r"a\.jsonl:2: '\\ud835' is half a character",
    ),
    (
        "a.jsonl",
        LINE + b'{"problem": "a", "answer": "\\udc00"}',
        r"a\.jsonl:2: '\\udc00' is half a character",
    ),
    ("a.jsonl", b'{"problem": "\\ud835\\udd38", "answer": "2"}', 1),
    ("a.jsonl", LINE + b'{"problem": "a\\u0000", "answer": "2"}', r"a\.jsonl:2: a NUL character"),
    (
        "a.jsonl",
        LINE + json.dumps(GOOD | {"problem": "x" * 200_000}).encode(),
        r":2: the prompt has 200018 tokens",
    ),
    # ------------------------------------------------------------------------------------- problems
    (
        "a.jsonl",
        task(5),
        r"a\.jsonl:2: column prompt holds int; it must be text or a list of messages",
    ),
    ("a.jsonl", task(["a"]), r"a\.jsonl:2: column prompt holds list"),
    ("a.jsonl", task({"role": "user"}), r"a\.jsonl:2: column prompt holds dict"),
    ("a.jsonl", task(None), r"a\.jsonl:2: no problem text in column prompt"),
    ("a.jsonl", task(" \n"), r"a\.jsonl:2: no problem text"),
    ("a.jsonl", task([]), r"a\.jsonl:2: no problem text"),
    ("a.jsonl", task("[1, 2] and [3]: the union?"), 2),
    ("a.jsonl", task('[{"a": 1}]'), 2),
    # ------------------------------------------------------------------------------------- messages
    ("a.jsonl", task([USER]), 2),
    ("a.jsonl", task([{"content": "a"}]), r"a\.jsonl:2: no problem text: message 1 has no role"),
    (
        "a.jsonl",
        task([{"role": 5, "content": "a"}]),
        r"a\.jsonl:2: no problem text: message 1 has no role",
    ),
    (
        "a.jsonl",
        task([USER, {"role": "user"}]),
        r":2: no problem text: message 2 \(user\) has no content",
    ),
    (
        "a.jsonl",
        task([USER, {"role": "user", "content": 5}]),
        r":2: .* message 2 \(user\) has int as its content",
    ),
    ("a.jsonl", task([USER, "a"]), r"a\.jsonl:2: column prompt holds list"),
    (
        "a.jsonl",
        task([{"role": "system", "content": "a"}]),
        r":2: the conversation ends with a message of system",
    ),
    (
        "a.jsonl",
        task([USER, {"role": "assistant", "content": "a"}]),
        r":2: the conversation ends with .* assistant",
    ),
    (
        "a.jsonl",
        task([{"role": "user", "content": " "}]),
        r"a\.jsonl:2: no problem text in the last message",
    ),
    ("a.jsonl", task([{"role": "user", "content": [{"type": "text", "text": "a"}]}]), 2),
    (
        "a.jsonl",
        task([{"role": "user", "content": [{"type": "image"}]}]),
        r":2: message 1 holds something that is",
    ),
    (
        "a.jsonl",
        task([{"role": "user", "content": "\ud835"}]),
        r"a\.jsonl:2: '\\ud835' is half a character",
    ),
    (
        "a.jsonl",
        task([{"role": "system", "content": "\0"}, USER]),
        r"a\.jsonl:2: a NUL character",
    ),
    (
        "a.jsonl",
        task("[{'role': 'user', 'content': 'a'}]"),
        r"a\.jsonl:2: messages written as a Python list",
    ),
    # ----------------------------------------------------------------------------------- .json, .gz
    ("a.json", b"\xef\xbb\xbf [" + LINE + b"," + LINE + b"]", 2),
    ("a.json", LINE * 3, 3),
    ("a.json", b"[]", r"a\.json: the file has no rows"),
    ("a.json", b"[1]", r"a\.json:1: a JSON int; every row must be one JSON object"),
    ("a.json", b"[" + LINE + b",", r"a\.json: not valid JSON .*; it must be one array of objects"),
    ("a.json", b'{\n"problem": "a"\n}', r"a\.json:1: not valid JSON"),
    (
        "a.json",
        b'{"problem": {"0": "a"}, "answer": {"0": "2"}}',
        r"a\.json:1: column problem holds dict",
    ),
    ("a.json.gz", gzip.compress(b"[" + LINE + b"]"), 1),
    ("a.jsonl.gz", GZIP, 50),
    ("a.jsonl.gz", gzip.compress(b""), r"a\.jsonl\.gz: the file has no rows"),
    ("a.jsonl.gz", LINE, r"a\.jsonl\.gz: cannot be read \(Not a gzipped file"),
    ("a.jsonl.gz", GZIP[:-12], r"a\.jsonl\.gz: cannot be read \(Compressed file ended"),
    ("a.jsonl.gz", GZIP[:-8] + b"\0" * 8, r"a\.jsonl\.gz: cannot be read \(CRC check failed"),
    ("a.jsonl.gz", GZIP[:10] + b"\xff" * 20, r"a\.jsonl\.gz: cannot be read \(Error -3"),
    # -------------------------------------------------------------------------------------- Parquet
    ("a.parquet", PARQUET, 2),
    ("a.parquet", b"PAR1", r"a\.parquet: not a Parquet file"),
    ("a.parquet", PARQUET[:-20], r"a\.parquet: not a Parquet file"),
    (
        "a.parquet",
        PARQUET[:4] + b"\xff" * 60 + PARQUET[64:],
        r"a\.parquet: (damaged after row 0|not a Parquet file)",
    ),
    (
        "a.parquet",
        parquet(problem=pyarrow.array([], pyarrow.string())),
        r"a\.parquet: the file has no rows",
    ),
    ("a.parquet", two_columns_of_one_name(), r"a\.parquet: two columns are named problem"),
    (
        "a.parquet",
        parquet(problem=not_utf8(), answer=["1"] * 3),
        r"a\.parquet:2: cannot be read \('utf-8'",
    ),
    (
        "a.parquet",
        parquet(problem=[b"a"], answer=["1"]),
        r"a\.parquet:1: column problem holds bytes",
    ),
    (
        "a.parquet",
        parquet(problem=[datetime(2026, 1, 1)], answer=["1"]),
        r":1: column problem holds datetime",
    ),
    (
        "a.parquet",
        parquet(problem=["a", None], answer=["1", "2"]),
        r"a\.parquet:2: no problem text in column problem",
    ),
    ("a.parquet", parquet(problem=["a"], answer=[Decimal("1.5")]), 1),
    (
        "a.parquet",
        parquet(problem=pyarrow.array(["a", "b"]).dictionary_encode(), answer=["1", "2"]),
        2,
    ),
    ("a.parquet", parquet(problem=pyarrow.array(["a"], pyarrow.large_string()), answer=["1"]), 1),
    ("a.parquet", parquet(prompt=[[USER]], answer=["1"]), 1),
    ("a.parquet", parquet(prompt=[json.dumps([USER])], answer=["1"]), 1),
]


@pytest.mark.parametrize(("name", "content", "expected"), FILES, ids=range(len(FILES)))
def test_a_file_is_read_or_named_in_one_line(
    tmp_path: Path, tokenizer: Any, name: str, content: bytes, expected: int | str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    if isinstance(expected, int):
        assert len(load(path, tokenizer)) == expected
        return
    with pytest.raises(DataError, match=expected) as caught:
        load(path, tokenizer)
    assert (
        "\n" not in str(caught.value)
        and str(path) in str(caught.value)
        and caught.value.exit_code == 2
    )


@pytest.mark.parametrize(("name", "content", "expected"), FILES, ids=range(len(FILES)))
def test_bad_rows_are_dropped_and_counted_and_damaged_files_are_not(
    tmp_path: Path, tokenizer: Any, name: str, content: bytes, expected: int | str
) -> None:
    """A message that names row 2 or a later one is of a file whose first row is good."""
    path = tmp_path / name
    path.write_bytes(content)
    warnings: list[str] = []
    settings: Any = {"config": replace(CHAT, bad_rows="drop"), "warn": warnings.append}
    is_row = isinstance(expected, str) and ":2:" in expected and "tokens" not in expected
    if isinstance(expected, str) and not is_row:
        with pytest.raises(DataError, match=r"data\.|:1|: ") as caught:
            load(path, tokenizer, **settings)
        assert "\n" not in str(caught.value)
        return
    tasks = load(path, tokenizer, **settings)
    assert tasks
    dropped = [text for text in warnings if text.startswith("data.bad_rows")]
    assert bool(dropped) == is_row
    assert all(
        f"left out 1 of {len(tasks) + 1} rows; the first: {path}:2: " in text for text in dropped
    )


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ("nowhere.jsonl", r"nowhere\.jsonl: no such file; check data\.train"),
        ("shards", r"shards: a directory; name its files, as in data\.train=.*shards/\*\.parquet"),
        ("none-*.jsonl", r"none-\*\.jsonl: matches no file; check data\.train"),
        ([], r"data\.train: names no file"),
        ("a\0.jsonl", r"data\.train: .* cannot be a file's name|no such file"),
        ("a" * 5000 + ".jsonl", r"data\.train: .* cannot be a file's name"),
    ],
)
def test_paths_that_name_no_file(tmp_path: Path, paths: str | list[str], message: str) -> None:
    (tmp_path / "shards").mkdir()
    given = [f"{tmp_path}/{path}" for path in ([paths] if isinstance(paths, str) else paths)]
    with pytest.raises(DataError, match=message) as caught:
        data_files(given, "data.train")
    assert "\n" not in str(caught.value)


def test_a_line_without_end(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "_MAX_LINE", 2**20)
    path = write(tmp_path / "a.jsonl", GOOD, GOOD | {"problem": "x" * 2**21})
    for policy in ("error", "drop"):
        with pytest.raises(
            DataError, match=r"a\.jsonl:2: a line of more than 1 MiB; put every row on its own"
        ):
            load(path, tokenizer, replace(CHAT, bad_rows=policy))


# ------------------------------------------------------------------------------------ several files
def test_several_files_are_one_data_set(tmp_path: Path, tokenizer: Any) -> None:
    """Files of different kinds and layouts; a prompt's index is its row over all of them."""
    write(tmp_path / "train-2.jsonl", {"problem": "c", "answer": "3"})
    write(
        tmp_path / "train-1.jsonl",
        "",
        {"prompt": "a", "answer": "1"},
        {"prompt": "b", "answer": "2"},
    )
    last = write(tmp_path / "x.parquet", {"question": "d", "reward_model": {"ground_truth": "4"}})
    tasks = load([f"{tmp_path}/train-*.jsonl", str(last)], tokenizer)
    assert [(p.problem, p.answer, p.index) for p in tasks] == [
        ("a", "1", 1), ("b", "2", 2), ("c", "3", 3), ("d", "4", 4),
    ]  # fmt: skip
    write(tmp_path / "train-3.jsonl", GOOD, {"problem": ""})
    with pytest.raises(DataError, match=r"train-3\.jsonl:2: no problem text"):
        load(f"{tmp_path}/train-*.jsonl", tokenizer)


def test_a_file_whose_name_is_a_pattern(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "a[1].jsonl", GOOD)
    assert data_files(str(path), "data.train") == [path]


def test_a_column_that_only_later_rows_have(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "a.jsonl", {"problem": "a"}, GOOD)
    with pytest.raises(DataError, match=r"a\.jsonl:1: no answer in column answer"):
        load(path, tokenizer)
    assert len(load(path, tokenizer, replace(CHAT, bad_rows="drop"))) == 1


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_dot_in_a_columns_name(tmp_path: Path, tokenizer: Any, suffix: str) -> None:
    """A column whose name has a dot, one inside another, and both at once: the name as it is
    wins."""
    flat = {"problem": "a", "reward_model.ground_truth": "flat"}
    nested = {"problem": "a", "reward_model": {"ground_truth": "nested", "style": "rule"}}
    answers = []
    for name, row in {"flat": flat, "nested": nested, "both": nested | flat}.items():
        (task,) = load(write(tmp_path / f"{name}{suffix}", row), tokenizer)
        answers.append(task.answer)
    assert answers == ["flat", "nested", "flat"]


def test_a_nested_column_that_lacks_the_answer_is_passed_over(
    tmp_path: Path, tokenizer: Any
) -> None:
    path = write(
        tmp_path / "a.jsonl", {"problem": "a", "reward_model": {"style": "rule"}, "solution": "2"}
    )
    assert load(path, tokenizer)[0].answer == "2"


def heldout_config(tmp_path: Path, heldout: Any) -> RunConfig:
    train = write(tmp_path / "train.jsonl", {"q": "a", "gold": "1"})
    data = DataConfig(str(train), heldout, problem_column="q", answer_column="gold")
    return tiny_config(data=data)


def test_a_held_out_set_has_columns_of_its_own(tmp_path: Path, tokenizer: Any) -> None:
    aime = str(write(tmp_path / "aime.jsonl", {"Problem": "b", "Answer": 25}))
    with pytest.raises(
        DataError,
        match=r"no column q .* set data\.heldout=\{path: \.\.\., problem_column: \.\.\.\}",
    ):
        load_heldout(heldout_config(tmp_path, aime), tokenizer)
    (task,) = load_heldout(
        heldout_config(tmp_path, HeldoutConfig(aime, "Problem", "Answer")), tokenizer
    )[""]
    assert (task.problem, task.answer) == ("b", "25")
    plain = str(write(tmp_path / "plain.jsonl", GOOD))
    (task,) = load_heldout(heldout_config(tmp_path, HeldoutConfig(plain)), tokenizer)[""]
    assert (task.problem, task.answer) == ("1+1?", "2")
    same = str(write(tmp_path / "same.jsonl", {"q": "c", "gold": "3"}))
    assert load_heldout(heldout_config(tmp_path, [same]), tokenizer)[""][0].problem == "c"


# -------------------------------------------------------------------------------------- what is odd
def test_repeated_prompts_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    warnings: list[str] = []
    first = write(tmp_path / "a.jsonl", GOOD, GOOD | {"problem": "2+2?"})
    second = write(tmp_path / "b.jsonl", GOOD, GOOD)
    assert len(load([str(first), str(second)], tokenizer, warn=warnings.append)) == 4
    assert warnings == [f"data.train: 2 of 4 prompts repeat another; {second}:1 is {first}:1"]


def test_changed_data_is_named(tmp_path: Path) -> None:
    paths = [str(write(tmp_path / f"{name}.jsonl", GOOD)) for name in "abc"]
    config = DataConfig(paths[:2], HeldoutConfig(paths[2]))
    stored = data_sha256(config)
    assert list(stored) == paths and len(set(stored.values())) == 1
    assert changed_data(stored, config) is None and changed_data({}, config) is None
    assert changed_data(stored, DataConfig(paths[:2])) == paths[2]
    write(Path(paths[1]), GOOD | {"answer": "3"})
    assert changed_data(stored, config) == paths[1]


def sharegpt(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    names = {"user": "human", "assistant": "gpt"}
    return [
        {"from": names.get(each["role"], each["role"]), "value": each["content"]}
        for each in messages
    ]


WAYS: dict[str, Callable[[list[dict[str, str]]], object]] = {
    "messages": lambda messages: messages,
    "json": json.dumps,
    "sharegpt": sharegpt,
    "sharegpt in json": lambda messages: json.dumps(sharegpt(messages)),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("way", WAYS)
def test_all_messages_reach_the_template(
    tmp_path: Path, tokenizer: Any, way: str, suffix: str
) -> None:
    turns = [
        ("system", "Be brief."),
        ("user", "1+1?"),
        ("assistant", "2"),
        ("user", "2+2?"),
        ("assistant", "4"),
    ]
    messages = [{"role": role, "content": content} for role, content in turns]
    row = {"prompt": WAYS[way](messages[:-1]), "reward_model": {"ground_truth": "4"}}
    (task,) = load(write(tmp_path / f"a{suffix}", row), tokenizer)
    text = "<system>Be brief.</s><user>1+1?</s><assistant>2</s><user>2+2?</s><assistant>"
    assert (task.text, task.problem, task.answer) == (text, "2+2?", "4")
    path = write(tmp_path / f"b{suffix}", {"conversations": WAYS[way](messages)})
    (task,) = load(path, tokenizer, need_answer=False, need_trace=True)
    assert (task.text, task.trace) == (text, "4")
    suffixed = replace(CHAT, template=TemplateConfig(text="{problem} Box it."))
    (task,) = load(path, tokenizer, suffixed, need_answer=False)
    assert task.text == text.replace("2+2?", "2+2? Box it.")


def test_a_rows_own_system_message_stands_in_the_recipes_place(
    tmp_path: Path, tokenizer: Any
) -> None:
    own = [{"role": "system", "content": "Own."}, USER]
    path = write(
        tmp_path / "a.jsonl", {"prompt": "a", "answer": "1"}, {"prompt": own, "answer": "2"}
    )
    warnings: list[str] = []
    first, second = load(
        path, tokenizer, replace(CHAT, template=TemplateConfig(system="Own.")), warn=warnings.append
    )
    assert first.text.startswith("<system>Own.</s><user>a") and second.text.startswith(
        "<system>Own.</s><user>1+1?"
    )
    assert not warnings
    first, second = load(
        path, tokenizer, replace(CHAT, template=TemplateConfig(system="tgpo")), warn=warnings.append
    )
    assert first.text.startswith("<system>Your task is") and second.text.startswith(
        "<system>Own.</s><user>1+1?"
    )
    assert warnings == [
        "data.template.system: not used by 1 of 2 prompts of data.train, which have a system "
        f"message of their own; the first: {path}:2"
    ]


def test_a_raw_template_has_no_place_for_messages(tmp_path: Path, tokenizer: Any) -> None:
    raw = replace(CHAT, template=TemplateConfig(kind="raw"))
    path = write(tmp_path / "a.jsonl", {"prompt": [USER], "answer": "1"})
    assert load(path, tokenizer, raw)[0].text == "1+1?"
    path = write(
        tmp_path / "a.jsonl", {"prompt": [{"role": "system", "content": "s"}, USER], "answer": "1"}
    )
    with pytest.raises(
        DataError,
        match=r"a\.jsonl:1: .* ahead of the problem \(system\); set data\.template\.kind=cha",
    ):
        load(path, tokenizer, raw)


def test_a_template_that_leaves_out_messages_is_noticed(tmp_path: Path, tokenizer: Any) -> None:
    silent = load_tokenizer(tokenizer.name_or_path)
    silent.chat_template = (
        "{% for m in messages if m.role == 'user' %}<user>{{ m.content }}{% endfor %}"
    )
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": [{"role": "system", "content": "French."}, USER], "answer": "1"},
    )
    warnings: list[str] = []
    load(path, silent, warn=warnings.append)
    assert warnings == [
        "data.train: the chat template leaves out the system message or the problem of 1 of 1 "
        f"prompts; the first: {path}:1"
    ]


# -------------------------------------------------------------------------------- what check counts
def test_check_counts_prompts_that_leave_no_room_and_those_in_both_sets(tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path))
    train = write(
        tmp_path / "long.jsonl", *({"problem": "1" * n, "answer": "1"} for n in (2, 4, 24, 25, 31))
    )
    heldout = write(
        tmp_path / "heldout.jsonl",
        {"problem": "1111", "answer": "1"},
        {"problem": "9", "answer": "1"},
    )
    files = [f"data.train={train}", f"data.heldout={heldout}"]
    assert check_data(load_config(recipe, files)) == [
        "data.max_prompt_tokens: 2 of 5 prompts of data.train leave no room for "
        "rollout.max_completion_tokens=8 within max_sequence_length=32; the longest has 31 "
        "tokens and leaves 1",
        "data.heldout: 1 of 2 prompts are in data.train too",
    ]
    shorter = [*files[:1], "data.max_prompt_tokens=24"]
    with pytest.raises(
        DataError, match=r"long\.jsonl:4: the prompt has 25 tokens, more than data\.max_prompt_t"
    ):
        check_data(load_config(recipe, shorter))
    assert check_data(
        load_config(recipe, [*shorter, "data.long_prompts=drop", "rollout.num_prompts=2"])
    ) == ["data.train: dropped 2 of 5 rows that are too long"]
    supervised = [
        "method=sft",
        "teacher=null",
        "data.trace_column=answer",
        "rollout={num_prompts: 1}",
        "max_sequence_length=34",
    ]
    assert check_data(load_config(recipe, [*files[:1], *supervised])) == []


def test_a_character_that_the_tokenizer_does_not_know(tmp_path: Path, tokenizer: Any) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}))
    few = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="b")
    few.name_or_path = "few"
    path = write(
        tmp_path / "a.jsonl", {"problem": "a", "answer": "1"}, {"problem": "c", "answer": "2"}
    )
    with pytest.raises(
        DataError, match=r"a\.jsonl:2: the tokenizer of few cannot read the text \(WordLevel error"
    ):
        load(path, few, replace(CHAT, template=TemplateConfig(kind="raw")))


def test_a_prompt_without_tokens_is_an_error(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_byte_tokenizer(tmp_path / "model"))
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("?", "")
    path = write(tmp_path / "a.jsonl", GOOD, {"problem": "??", "answer": "2"})
    with pytest.raises(DataError, match=r"a\.jsonl:2: the prompt has no token in .*model"):
        load(path, tokenizer, replace(CHAT, template=TemplateConfig("raw")))


# --------------------------------------------------------------------------- where a row is from
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_row_says_where_it_is_from(tmp_path: Path, tokenizer: Any, suffix: str) -> None:
    rows = [GOOD | {"meta": {"domain": name}} for name in ("algebra", "code", "algebra")]
    path = write(tmp_path / f"rows.{suffix}", *rows)
    config = replace(CHAT, source_column="meta.domain")
    assert [task.source for task in load(path, tokenizer, config)] == ["algebra", "code", "algebra"]
    assert [task.source for task in load(path, tokenizer)] == ["", "", ""]


def test_a_row_without_its_source_is_named(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "rows.jsonl", GOOD | {"domain": "code"}, GOOD | {"domain": None})
    with pytest.raises(DataError, match=r"rows\.jsonl:2: no source in column domain"):
        load(path, tokenizer, replace(CHAT, source_column="domain"))
    with pytest.raises(DataError, match=r"no column origin .*; set data\.source_column"):
        load(path, tokenizer, replace(CHAT, source_column="origin"))
