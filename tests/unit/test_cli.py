"""The commands: what they print, their exit codes, and that cheap ones stay cheap."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest

from megatron_opd import __version__
from megatron_opd.checks.training import check_data, check_resumed
from megatron_opd.cli import commands
from megatron_opd.cli import main as cli
from megatron_opd.cli.arguments import parse
from megatron_opd.errors import ConfigError, DataError, Interrupted, RunError
from megatron_opd.files.manifest import write_manifest
from megatron_opd.recipe.load import dump_config, load_config
from megatron_opd.start import recipe_to_train, to_resume
from tests.unit.tiny_model_files import write_recipe


@pytest.fixture(autouse=True)
def outside_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    return str(write_recipe(tmp_path))


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err


# ----------------------------------------------------------------------------------- cheap commands
def test_cheap_commands_import_nothing_heavy(recipe: str) -> None:
    heavy = "{'torch', 'transformers', 'vllm', 'megatron.core'} & set(sys.modules)"
    refused = [recipe, "--nproc", "3"]
    for argv, code in {
        ("recipes",): 0,
        ("show", recipe): 0,
        ("show", recipe, "sed=1"): 2,
        ("train", *refused): 2,
    }.items():
        program = (
            "import sys; from megatron_opd.cli.main import main; "
            f"assert main({argv!r}) == {code}; sys.exit({heavy} or 0)"
        )
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert result.returncode == 0, (argv, result.stderr)


def test_recipes_lists_method_and_first_comment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipes").mkdir()
    write_recipe(tmp_path).rename(tmp_path / "recipes" / "mine.yaml")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["recipes"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert rows["mine"].split(maxsplit=2)[1:] == ["tgpo", "A recipe of the tests."]
    assert "demo" in rows


def test_show_prints_a_recipe(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["show", recipe, "seed=3"]) == 0
    shown = tmp_path / "shown.yaml"
    shown.write_text(capsys.readouterr().out)
    assert load_config(str(shown)) == load_config(recipe, ["seed=3"])


def test_overrides_may_surround_options(recipe: str) -> None:
    arguments = parse(["train", recipe, "a=1", "--nproc", "2", "b=2", "--resume", "c=3"])
    assert (arguments.overrides, arguments.nproc, arguments.resume) == (
        ["a=1", "b=2", "c=3"],
        2,
        True,
    )


@pytest.mark.parametrize(
    "argv",
    [["train"], ["train", "x", "--nproc", "0"], ["show", "x", "--nope"], ["report"]],
)
def test_wrong_usage_exits_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
    assert "usage: megatron-opd" in capsys.readouterr().err


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for option, expected in {
        "--version": __version__,
        "--help": "torchrun --nproc-per-node",
    }.items():
        with pytest.raises(SystemExit) as caught:
            cli.main([option])
        assert caught.value.code == 0
        assert expected in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- errors
def test_bad_input_is_one_line_and_exit_code_2(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["show", recipe, "rollout.num_promts=3"]) == 2
    assert error_line(capsys).startswith(
        "megatron-opd: error: override 'rollout.num_promts=3': unknown key"
    )


@pytest.mark.parametrize(
    ("error", "rank", "printed"),
    [
        (ConfigError("a:\n b"), 0, "megatron-opd: error: a: b\n"),
        (ConfigError("a: b"), 1, ""),  # rank 0 says it
        (RunError("a dead engine"), 1, "megatron-opd: error: rank 1: a dead engine\n"),
        (Interrupted("saved"), 0, "megatron-opd: saved\n"),
        (Interrupted("saved"), 1, ""),
        (KeyboardInterrupt(), 0, "megatron-opd: interrupted\n"),
    ],
)
def test_each_error_is_printed_once(
    error: BaseException,
    rank: int,
    printed: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(arguments: object) -> None:
        raise error

    monkeypatch.setattr(commands, "recipes", fail)
    monkeypatch.setenv("RANK", str(rank))
    assert cli.main(["recipes"]) == getattr(error, "exit_code", 130)
    assert capsys.readouterr().err == printed


# ---------------------------------------------------------------------------------- check and train
def test_check_reads_models_and_data(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["check", recipe, "--nproc", "2"]) == 0
    assert (
        capsys.readouterr().out
        == f"OK: tiny: tgpo, --nproc 1 or a multiple, into {tmp_path / 'run'}\n"
    )
    assert cli.main(["check", recipe, "teacher.processes=2", "--nproc", "3"]) == 0
    assert "--nproc 1 or a multiple plus 2 for the teacher, into" in capsys.readouterr().out
    assert (
        cli.main(["check", recipe, "rollout.processes=1", "teacher.processes=2", "--nproc", "4"])
        == 0
    )
    assert (
        "--nproc 1 or a multiple plus 1 for the rollout plus 2 for the teacher, into"
        in capsys.readouterr().out
    )
    assert not (tmp_path / "run").exists()
    (tmp_path / "train.jsonl").write_text(
        '{"problem": "1+1=", "answer": "2"}\n{"problem": "1+2="}\n'
    )
    assert cli.main(["check", recipe]) == 2
    assert f"{tmp_path / 'train.jsonl'}" in error_line(capsys)
    (tmp_path / "train.jsonl").unlink()
    assert cli.main(["check", recipe]) == 2
    assert f"{tmp_path / 'train.jsonl'}" in error_line(capsys)


def test_check_warns_of_a_data_set_smaller_than_a_step(recipe: str) -> None:
    warnings = check_data(load_config(recipe, ["rollout.num_prompts=9"]))
    assert [text.split(":")[0] for text in warnings] == ["rollout.num_prompts"]
    refilled = check_data(
        load_config(recipe, ["method=dapo", "teacher=null", "rollout.num_prompts=5"])
    )
    assert [text.split(":")[0] for text in refilled] == ["method.max_refills"]


def test_check_counts_gold_answers_that_nothing_can_be_compared_with(
    recipe: str, tmp_path: Path
) -> None:
    config = load_config(recipe, ["method=grpo", "teacher=null"])
    golds = ["5"] * 39 + ["less than 7"]
    rows = [{"problem": f"{i}+1=", "answer": gold} for i, gold in enumerate(golds)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bad = (
        "data.train: bad_gold: 1 of 40 gold answers state no value to compare with, "
        "first row 40 ('less than 7')"
    )
    assert f"{bad}; every answer to them scores 0" in check_data(config)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[-4:]))
    with pytest.raises(
        DataError, match=r"data\.train: bad_gold: 1 of 4 gold answers .* name another answer_column"
    ):
        check_data(config)
    assert not [
        text for text in check_data(load_config(recipe, ["method=opd"])) if "bad_gold" in text
    ]


@pytest.mark.parametrize(
    ("asks", "mode", "warned"),
    [
        ("Last line: Answer: $Answer", "boxed", True),
        ("Last line: Answer: $Answer", "boxed_or_last", False),
        ("Write \\boxed{}, as in Answer: \\boxed{3}", "boxed", False),
        ("Answer:", "boxed", False),
    ],
)
def test_check_warns_of_answers_that_are_asked_for_and_not_read(
    recipe: str, tmp_path: Path, asks: str, mode: str, warned: bool
) -> None:
    """DAPO's data ask for "Answer: $Answer"."""
    rows = [{"problem": f"{i}+1= {asks}", "answer": "5"} for i in range(4)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = load_config(
        recipe, ["method=grpo", "teacher=null", f"reward.answer={mode}", "max_sequence_length=512"]
    )
    warnings = [
        text
        for text in check_data(config)
        if text.startswith("reward.answer: 4 of 4 prompts of data.train")
    ]
    assert bool(warnings) == warned
    assert all(text.endswith("set reward.answer=boxed_or_last") for text in warnings)


def test_train_names_nproc_when_the_layout_needs_more(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", recipe, "student.layout.tensor_model_parallel_size=2"]) == 2
    assert "needs at least 2 processes, there would be 1; start 2 in all" in error_line(capsys)


def test_under_torchrun_every_rank_refuses_and_rank_0_says_so(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert cli.main(["train", recipe, "student.layout.tensor_model_parallel_size=4"]) == 2
    assert "does not divide" in error_line(capsys)


def test_train_does_not_overwrite_a_run(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("name: x\n")
    assert cli.main(["train", recipe]) == 2
    assert f"run_dir: {tmp_path / 'run'} exists already; use --resume" in error_line(capsys)


def test_a_resumed_run_keeps_its_recipe(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", recipe, "--resume"]) == 2
    assert "holds no run to resume" in error_line(capsys)
    (tmp_path / "run").mkdir()
    assert cli.main(["show", recipe]) == 0
    (tmp_path / "run" / "config.yaml").write_text(capsys.readouterr().out)
    for run in (recipe, str(tmp_path / "run")):
        check_resumed(
            load_config(run, ["num_steps=9", "checkpoint.keep=1", "log.tensorboard=false"])
        )
        assert cli.main(["train", run, "--resume", "train.optimizer.lr=1.0"]) == 2
        assert "train.optimizer.lr: differs from" in error_line(capsys)


def test_a_recipe_leaves_open_what_its_run_has_pinned(recipe: str, tmp_path: Path) -> None:
    config = load_config(recipe)
    template = replace(config.data.template, date=date(2024, 2, 29))
    pinned = replace(
        config, data=replace(config.data, template=template, sha256={"a.jsonl": "0" * 64})
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(dump_config(pinned))
    check_resumed(to_resume(config))
    with pytest.raises(ConfigError, match=r"data\.template\.date: differs from"):
        other_day = replace(template, date=date(2024, 3, 1))
        check_resumed(to_resume(replace(config, data=replace(config.data, template=other_day))))


def test_a_resumed_run_is_not_shortened_below_what_it_has_done(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    for step in (2, 4):
        directory = run / "checkpoints" / f"step-{step:06d}"
        directory.mkdir(parents=True)
        (directory / "state.json").write_text("{}")
        write_manifest(directory)
    (run / "checkpoints" / "step-000009").mkdir()  # no checkpoint
    cli.main(["show", recipe])
    (run / "config.yaml").write_text(capsys.readouterr().out)
    check_resumed(load_config(str(run), ["num_steps=4"]))
    with pytest.raises(ConfigError) as caught:
        check_resumed(load_config(str(run), ["num_steps=3"]))
    assert str(caught.value) == (
        f"num_steps: 3 is below the 4 steps that {run} has done; give num_steps=4 or more (the "
        f"weights of an earlier step: megatron-opd convert {run}/checkpoints/step-000002 OUT)"
    )
    (run / "checkpoints" / "step-000004" / "state.json").unlink()
    check_resumed(load_config(str(run)))  # the one before will do
    (run / "checkpoints" / "step-000002" / "state.json").write_text("{}  ")
    with pytest.raises(
        DataError, match=r"step-000004: state.json is missing; no whole checkpoint is left"
    ):
        check_resumed(load_config(str(run)))


def test_a_moved_run_resumes_where_it_is(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    cli.main(["show", recipe])
    (moved / "config.yaml").write_text(capsys.readouterr().out)
    config = recipe_to_train(str(moved), resume=True)
    assert config.directory == str(moved)
    check_resumed(config)


def test_eval_needs_held_out_prompts(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", recipe]) == 2
    assert "data.heldout: missing" in error_line(capsys)
    assert cli.main(["eval", recipe, "data.heldout=x.jsonl", "--model", "/nowhere"]) == 2
    assert "/nowhere: no such model directory" in error_line(capsys)


@pytest.mark.slow
def test_doctor_fails_for_a_broken_recipe_before_it_starts_anything(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "teacher" / "model.safetensors").unlink()
    assert cli.main(["doctor", recipe]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines[:-1]} <= {"ok", "warn"}
    assert "no *.safetensors file" in lines[-1]


def test_doctor_needs_a_recipe_for_processes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--nproc", "2"]) == 2
    assert "--nproc: no effect without a recipe" in error_line(capsys)


def test_the_commands_that_recipes_and_pages_name_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    commands = set(re.findall(r"^    ([a-z]+)  ", capsys.readouterr().out, re.MULTILINE))
    root = Path(__file__).parents[2]
    paths = [
        root / "README.md",
        *(root / "docs").rglob("*.md"),
        *(root / "recipes").rglob("*.yaml"),
    ]
    for path in paths:
        named = re.findall(r"megatron-opd ([a-z]+)", path.read_text())
        assert commands.issuperset(named), path
    assert len(commands) > 10
