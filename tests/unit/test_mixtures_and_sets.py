"""Mixtures of training data, and several held-out sets with keys of their own."""

import json
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from megatron_opd.cli.main import main
from megatron_opd.evaluation.heldout import measured
from megatron_opd.metrics.console import set_words
from megatron_opd.metrics.run_directory import drop_steps_from, heldout_path
from megatron_opd.recipe.keys import RunConfig
from megatron_opd.recipe.load import dump_config, load_config
from megatron_opd.report.sources import read_sets
from megatron_opd.tasks.data import load_heldout, load_training
from megatron_opd.tasks.data_files import changed_data, data_sha256
from megatron_opd.tasks.pin import pin
from megatron_opd.tasks.tokenizer import load_tokenizer
from tests.rows import row, task
from tests.unit.byte_tokenizer import write_byte_tokenizer
from tests.unit.tiny_model_files import write_recipe


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return str(path)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    first = write(tmp_path / "a.jsonl", {"problem": "1+1=", "answer": "2"}, {"problem": ""})
    second = write(tmp_path / "b.jsonl", {"q": "2+2=", "gold": "4", "from": "web"})
    third = write(tmp_path / "c.jsonl", *({"problem": f"{i}=", "answer": str(i)} for i in range(3)))
    data = {
        "mixture": {
            "sums": {"path": first, "weight": 3.0},
            "web": {"path": second, "problem_column": "q", "answer_column": "gold"},
            "gone": None,
        },
        "bad_rows": "drop",
        "heldout": third,
        "heldout_sets": {
            "dated": {
                "path": second,
                "problem_column": "q",
                "answer_column": "gold",
                "source_column": "from",
                "template": {"kind": "chat", "text": "{problem}?"},
                "samples_per_prompt": 4,
                "temperature": 0.5,
            },
            "short": {"path": [third, first], "source": "sums", "num_prompts": 1},
        },
        "template": {"kind": "raw"},
    }
    return load_config(str(write_recipe(tmp_path, data=data, eval={"every": 1, "num_prompts": 2})))


def test_parts_are_sources_with_columns_of_their_own(config: RunConfig) -> None:
    assert load_config_of(config) == config
    tokenizer = load_tokenizer(config.student.path)
    parts = load_training(config, tokenizer, need_answer=True, need_trace=False)
    found = {
        name: [(t.index, t.problem, t.answer, t.source) for t in tasks]
        for name, tasks in parts.items()
    }
    assert found == {"sums": [(0, "1+1=", "2", "sums")], "web": [(1, "2+2=", "4", "web")]}


def load_config_of(config: RunConfig) -> RunConfig:
    path = Path(config.data.sets["short"].path[0]).parent / "dumped.yaml"
    path.write_text(dump_config(config))
    return load_config(str(path))


def test_sets_are_asked_in_their_own_way(config: RunConfig, tmp_path: Path) -> None:
    """Also on the day of the run, which is pinned."""
    tokenizer = load_tokenizer(write_byte_tokenizer(tmp_path / "bytes"))
    tokenizer.chat_template = "{{ strftime_now('%Y') }} {{ messages[0].content }}"
    config = replace(config, data=replace(config.data, template=replace(
        config.data.template, date=date(2001, 1, 1))))  # fmt: skip
    sets = load_heldout(config, tokenizer)
    assert {name: [task.text for task in tasks] for name, tasks in sets.items()} == {
        "": ["0=", "1="],
        "dated": ["2001 2+2=?"],
        "short": ["0="],
    }
    assert [sets[name][0].source for name in sets] == ["", "web", "sums"]
    dated = config.evaluation_of("dated")
    assert (dated.samples_per_prompt, dated.temperature, dated.num_prompts) == (4, 0.5, 2)
    assert config.evaluation_of("short").num_prompts == 1
    assert config.evaluation_of("") == config.eval


def test_all_files_are_pinned(config: RunConfig, tmp_path: Path) -> None:
    stored = data_sha256(config.data)
    assert set(stored) == set(config.data.paths) == {str(tmp_path / f"{n}.jsonl") for n in "abc"}
    assert pin(config).data.sha256 == stored
    write(tmp_path / "b.jsonl", {"q": "3", "gold": "4"})
    assert changed_data(stored, config.data) == str(tmp_path / "b.jsonl")


def test_a_set_has_metrics_and_a_folder_of_its_own(tmp_path: Path, config: RunConfig) -> None:
    metrics = measured({"": [[row([1], of=task(0))]]}, config.evaluation_of("short"), "set/short/")
    assert metrics["eval/set/short/accuracy"] == 0
    assert all(name.startswith("eval/set/short/") for name in metrics)
    (words,) = set_words(metrics)
    assert words.startswith("short 0.0%, 95 % ")
    (shown,) = read_sets([{"step": 0} | metrics, {"step": 3} | metrics])
    assert (shown.name, shown.accuracy.first, shown.interval[-5:]) == ("short", "0.0%", "n = 1")
    for step in (1, 2):
        path = heldout_path(tmp_path, step, "short")
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}\n")
    drop_steps_from(tmp_path, 2)
    assert [p.name for p in (tmp_path / "heldout_short").iterdir()] == ["step-000001.jsonl"]


PART = "{path: train.jsonl}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([f"data.mixture={{a: {PART}}}"], "data.train: no effect with data.mixture"),
        (["data.train=[]", "data.mixture={a: null}"], "data.mixture: every part is null"),
        (["data.train=[]", f"data.mixture={{a/b: {PART}}}"], "data.mixture: 'a/b' cannot be"),
        (["data.train=[]", "data.mixture={a: {path: train.jsonl, weight: 0}}"], "greater than 0"),
        (["data.train=[]", "data.mixture={a: {path: empty.jsonl}}"], "empty.jsonl: the file has"),
        (
            ["data.train=[]", "data.mixture={a: {path: train.jsonl, answer_column: x}}"],
            "set data.mixture.a.answer_column",
        ),
        ([f"data.heldout_sets={{with_skills: {PART}}}"], "'with_skills' cannot be a name"),
        (
            ["data.heldout_sets={a: {path: train.jsonl, source: b, source_column: c}}"],
            "data.heldout_sets.a.source_column: no effect with source=b",
        ),
        (
            ["data.heldout_sets={a: {path: train.jsonl, samples_per_prompt: 2}}", "eval={}"],
            "data.heldout_sets.a.samples_per_prompt: greedy",
        ),
        (
            ["data.heldout_sets={a: {path: train.jsonl, template: {kind: raw, system: x}}}"],
            "data.heldout_sets.a.template.system: no effect with kind=raw",
        ),
        (["data.heldout_sets={a: {path: no.jsonl}}"], "no.jsonl: no such file; check data.heldout"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    recipe = write_recipe(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    assert main(["check", str(recipe), *overrides]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_mixture_is_checked_part_by_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rewards are routed by the names of parts, without a column."""
    recipe = write_recipe(tmp_path)
    train = tmp_path / "train.jsonl"
    overrides = ["data.train=[]", f"data.mixture={{a: {{path: {train}}}, b: {{path: {train}}}}}"]
    rewards = "reward.rewards={x: {kind: math, sources: [a]}, y: {kind: format, sources: [b]}}"
    assert main(["check", str(recipe), *overrides, rewards]) == 0
    assert main(["check", str(recipe), *overrides, rewards.replace("[b]", "[c]")]) == 2
    error = capsys.readouterr().err
    assert "data.mixture.b: no reward grades the 8 rows of source 'b'" in error


@pytest.mark.parametrize(
    ("value", "problem"),
    [(None, "no number in column hard"), ("3", "no number"), (float("nan"), "no number"), (2, "")],
)
def test_a_curriculum_reads_numbers(
    tmp_path: Path, value: object, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "levels.jsonl", {"problem": "1=", "answer": "1", "hard": value})
    recipe = str(write_recipe(tmp_path))
    overrides = [f"data.train={path}", "data.curriculum={column: hard}"]
    assert main(["check", recipe, *overrides]) == (2 if problem else 0)
    assert problem in capsys.readouterr().err
    assert main(["check", recipe, overrides[0], "data.curriculum={column: easy}"]) == 2
    assert "no column easy among those found" in capsys.readouterr().err
    if not problem:
        config = load_config(recipe, overrides)
        tokenizer = load_tokenizer(config.student.path)
        parts = load_training(config, tokenizer, need_answer=True, need_trace=False)
        assert [t.level for t in parts[""]] == [2.0]
