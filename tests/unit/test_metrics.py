"""The run directory, the terminal output and the report, on a made-up run written through
`Sinks`."""

import dataclasses
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from megatron_opd.architectures.config import ModelConfig
from megatron_opd.contracts.rows import Row, StepRecord, Task, Verdict
from megatron_opd.contracts.signals import TeacherSignals
from megatron_opd.errors import ConfigError, DataError
from megatron_opd.methods.catalogue import CATALOGUE
from megatron_opd.metrics.console import LiveConsole, PlainConsole, open_console
from megatron_opd.metrics.run_directory import Line, read_metrics, read_rollouts, rollouts_path
from megatron_opd.metrics.sinks import Sinks
from megatron_opd.recipe.data import DataConfig
from megatron_opd.recipe.keys import LogConfig, OptimizerConfig, RunConfig, TrainConfig
from megatron_opd.recipe.load import dump_config
from megatron_opd.report.drawing import series
from megatron_opd.report.page import write_report
from megatron_opd.report.plots import draw_plots
from tests.rows import row

CHARACTERS = "0123456789+=?, carytensumo.\n<>"
EOS = len(CHARACTERS)
NUM_STEPS = 80


def make_tokenizer() -> Tokenizer:
    vocabulary = {character: index for index, character in enumerate(CHARACTERS)} | {
        "</s>": EOS,
        "<unk>": EOS + 1,
    }
    return Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))


def encode(text: str) -> np.ndarray:
    return np.array([CHARACTERS.index(character) for character in text], dtype=np.int32)


def make_config(method: str = "tgpo_annealing", **changes: Any) -> RunConfig:
    config = RunConfig(
        name="arithmetic-demo",
        num_steps=NUM_STEPS,
        max_sequence_length=64,
        student=ModelConfig("models/student-4M"),
        teacher=ModelConfig("models/teacher-13M"),
        method=CATALOGUE[method].method,
        data=DataConfig(train="data/train.jsonl", heldout="data/heldout.jsonl"),
        train=TrainConfig(OptimizerConfig(lr=1e-3)),
    )
    return dataclasses.replace(config, **changes)


def make_record(step: int, num_steps: int = NUM_STEPS) -> StepRecord:
    """A step of a student that learns addition from a teacher; the same step is the same record
    every time."""
    random = np.random.default_rng(step)
    skill = 0.25 + 0.65 * (1 - math.exp(-3.5 * step / num_steps))
    rows = [
        _make_row(random, index, sample, skill, step) for index in range(4) for sample in range(4)
    ]
    num_tokens = sum(row.num_tokens for row in rows)
    agree = random.random(num_tokens) < 0.4 + 0.6 * skill
    own_ids = np.concatenate([row.token_ids for row in rows])
    teacher = TeacherSignals(
        argmax_ids_T=np.where(agree, own_ids, random.integers(0, 10, num_tokens)).astype(np.int32),
        logprobs_T=np.where(agree, -0.1, -4 * random.random(num_tokens)).astype(np.float32),
        entropy_T=random.random(num_tokens).astype(np.float32),
    )
    right = sum(row.reward for row in rows)
    seconds = random.uniform(0.9, 1.1, 4) * [0.62, 0.11, 0.33, 0.03]
    metrics = {
        "reward/mean": right / len(rows),
        "reward/reason/correct": int(right),
        "reward/reason/wrong": int(len(rows) - right),
        "rollout/policy_version": step,
        "rollout/completion_tokens/mean": num_tokens / len(rows),
        "train/loss": 0.8 - 0.5 * skill + random.normal(0, 0.02),
        "train/grad_norm": 1.4 - skill + abs(random.normal(0, 0.1)),
        "objective/guidance/weight": max(0.5 - 0.01 * step, 0.0),
        "mismatch/logprob_abs/mean": 2e-6 * math.exp(random.normal(0, 0.4)),
        "student/entropy/mean": 1.2 - skill + random.normal(0, 0.03),
        "teacher/agreement/mean": float(agree.mean()),
        "teacher/entropy/mean": 0.3 - 0.2 * skill + random.normal(0, 0.01),
        "timing/step_seconds": float(seconds.sum()) + 0.05 + 6.0 * (step == 0),
        "timing/generate_seconds": float(seconds[0]),
        "timing/teacher_seconds": float(seconds[1]),
        "timing/train_seconds": float(seconds[2]),
        "timing/refit_seconds": float(seconds[3]),
    }
    if step % 20 == 0:
        metrics["eval/accuracy"] = skill
    return StepRecord(step, metrics, rows, teacher)


def _make_row(random: np.random.Generator, index: int, sample: int, skill: float, step: int) -> Row:
    left, right = np.random.default_rng([step, index]).integers(10, 99, 2)
    correct = random.random() < skill
    total = left + right + (0 if correct else random.integers(1, 9))
    units = left % 10 + right % 10
    text = f"{left % 10}+{right % 10}={units},\ncarry {units // 10}, sum {total}"
    token_ids = np.append(encode(text), EOS).astype(np.int32)
    problem = f"What is {left} + {right}?"
    answer, prompt_ids = str(left + right), encode(f"{left}+{right}=?")
    logprobs = -random.exponential(0.3, len(token_ids)).astype(np.float32)
    reason = "correct" if correct else "wrong"
    return row(
        token_ids,
        of=Task(index, problem, answer, f"{problem}\n", prompt_ids),
        group=index,
        sample=sample,
        reward=float(correct),
        verdict=Verdict(float(correct), bool(correct), reason),
        logprobs=logprobs,
        version=step,
        text=text,
    )


def write_run(
    run_dir: Path, steps: range, config: RunConfig | None = None, resume_step: int | None = None
) -> Path:
    config = config or make_config(log=LogConfig(tensorboard=False))
    with Sinks(run_dir, config, make_tokenizer(), resume_step) as sinks:
        (run_dir / "config.yaml").write_text(dump_config(config))
        for step in steps:
            sinks.log(make_record(step))
    return run_dir


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = write_run(tmp_path_factory.mktemp("runs") / "demo", range(NUM_STEPS))
    with Sinks(
        run_dir, make_config(log=LogConfig(tensorboard=False)), resume_step=NUM_STEPS
    ) as sinks:
        sinks.log(StepRecord(NUM_STEPS, {"eval/accuracy": 0.87, "timing/eval_seconds": 1.5}))
    return run_dir


@pytest.fixture(scope="module")
def page(finished_run: Path) -> str:
    return write_report(finished_run).read_text()


def files_of(run_dir: Path) -> dict[str, bytes]:
    """Everything a resumed run must repeat bit for bit."""
    files = [run_dir / "metrics.jsonl", *(run_dir / "rollouts").iterdir()]
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in files}


# -------------------------------------------------------------------------------------------- sinks
def test_metrics_keep_every_bit(tmp_path: Path) -> None:
    row = read_metrics(write_run(tmp_path, range(1)))[0]
    assert row.pop("step") == 0
    assert row == make_record(0).metrics


def test_rollouts_read_back_exactly(tmp_path: Path) -> None:
    write_run(
        tmp_path, range(1), make_config(log=LogConfig(rollouts_per_step=5, tensorboard=False))
    )
    lines = read_rollouts(rollouts_path(tmp_path, 0))
    record = make_record(0)
    assert record.teacher is not None and len(lines) == 5
    start = 0
    for line, sampled in zip(lines, record.rows, strict=False):
        stop = start + sampled.num_tokens
        assert line["token_ids"] == sampled.token_ids.tolist()
        assert "".join(line["tokens"][:-1]) == sampled.text == line["completion"]
        assert np.array_equal(np.array(line["logprobs"], dtype=np.float32), sampled.logprobs)
        assert line["teacher"]["argmax_ids"] == record.teacher.argmax_ids_T[start:stop].tolist()
        assert np.array_equal(
            np.array(line["teacher"]["entropy"], np.float32), record.teacher.entropy_T[start:stop]
        )
        start = stop


def test_resume_repeats_the_dropped_steps_identically(tmp_path: Path) -> None:
    whole = write_run(tmp_path / "whole", range(9))
    parts = write_run(tmp_path / "parts", range(7))
    with (parts / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 7, "reward/me')  # killed while writing
    write_run(parts, range(4, 9), resume_step=4)
    assert files_of(parts) == files_of(whole)
    assert json.loads((parts / "env.json").read_text())["resumed_at_step"] == 4


def test_a_new_run_never_overwrites(tmp_path: Path) -> None:
    before = files_of(write_run(tmp_path, range(2)))
    with pytest.raises(ConfigError, match="already holds a run"):
        write_run(tmp_path, range(1))
    assert files_of(tmp_path) == before


def test_nonfinite_values_are_valid_json_and_visible(tmp_path: Path) -> None:
    config = make_config(log=LogConfig(tensorboard=False))
    with Sinks(tmp_path, config) as sinks:
        sinks.log(
            StepRecord(0, {"train/loss": math.nan, "train/grad_norm": math.inf, "reward/mean": 0.5})
        )
    line = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert row["train/loss"] is None and row["reward/mean"] == 0.5
    assert row["nonfinite"] == "train/loss=nan train/grad_norm=inf"
    assert "train/grad_norm=inf" in write_report(tmp_path).read_text()


def test_environment_names_no_machine(tmp_path: Path) -> None:
    write_run(tmp_path, range(0))
    text = (tmp_path / "env.json").read_text()
    environment = json.loads(text)
    assert (
        environment["packages"]["torch"]
        and environment["world_size"] == 1
        and environment["cores"] >= 1
    )
    assert "/" not in text
    assert Path.home().name not in re.findall(r"\w+", text)


def test_tensorboard_forgets_the_dropped_steps(tmp_path: Path) -> None:
    config = make_config()
    for steps, resume_step, reward in ((range(4), None, 0.1), (range(2, 5), 2, 0.9)):
        with Sinks(tmp_path, config, resume_step=resume_step) as sinks:
            for step in steps:
                sinks.log(StepRecord(step, {"reward/mean": reward}))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("reward/mean")
    assert [event.step for event in events] == [0, 1, 2, 3, 4]
    assert [event.value for event in events] == pytest.approx([0.1, 0.1, 0.9, 0.9, 0.9])


# ------------------------------------------------------------------------------------------ console
def test_plain_line() -> None:
    stream = io.StringIO()
    console = open_console(make_config(), Console(file=stream, highlight=False, width=40))
    assert isinstance(console, PlainConsole)
    console.note("evaluating [200] prompts")
    console.log(12, {
        "reward/mean": 0.40625, "rollout/completion_tokens/mean": 11.8125, "train/loss": math.nan,
        "train/grad_norm": 0.5, "objective/guidance/weight": 0.0019, "timing/step_seconds": 1.12,
        "timing/train_seconds": 0.31, "timing/generate_seconds": 0.6, "timing/refit_seconds": 0.051,
    })  # fmt: skip
    assert stream.getvalue() == (
        "evaluating [200] prompts\nstep 12/80 reward 0.406 tokens 11.8 loss nan grad 0.5 w 0.0019 "
        "1.1 s (generate 0.6 train 0.3 refit 0.05)\n"
    )


def test_live_table_shows_the_last_steps() -> None:
    stream = io.StringIO()
    console = open_console(
        make_config(), Console(file=stream, force_terminal=True, width=100, height=30)
    )
    assert isinstance(console, LiveConsole)
    for step in range(13):
        console.log(step, make_record(step).metrics)
    console.note("saved step 12")
    console.close()
    screen = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    last = screen[screen.rindex("arithmetic-demo") :]
    assert re.findall(r"│ +(\d+) │ ", last) == [str(step) for step in range(3, 13)]
    assert "held-out" not in last  # only step 0 has it, and it has scrolled out
    assert "13/80 steps" in last and re.search(r"1:1\d left", last)
    assert "saved step 12" in screen


# --------------------------------------------------------------------------------- plots and report
def test_report_of_a_finished_run(finished_run: Path, page: str) -> None:
    names = {path.stem for path in (finished_run / "plots").glob("*.png")}
    assert names == {
        "reward",
        "reasons",
        "response_length",
        "entropy",
        "agreement",
        "loss",
        "grad_norm",
        "term_weight",
        "mismatch",
        "time",
    }
    assert page.count("data:image/png;base64,") == len(names)
    assert all(
        path.read_bytes().startswith(b"\x89PNG") for path in (finished_run / "plots").glob("*.png")
    )
    for text in (
        "tgpo_annealing",
        "student-4M",
        "teacher-13M",
        "25.0% → </small>87.0%",
        "+62.0 points",
        "finished",
    ):
        assert text in page
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page) and "<script" not in page


def both(row: Line) -> tuple[list[int], list[int]]:
    return row["token_ids"], row["teacher"]["argmax_ids"]


def test_marked_tokens_are_the_disagreements(finished_run: Path, page: str) -> None:
    rows = read_rollouts(rollouts_path(finished_run, 0))
    differing = [own != best for row in rows for own, best in zip(*both(row), strict=True)]
    assert f"teacher disagrees with {np.mean(differing):.1%} of the recorded tokens" in page
    marked = re.findall(r'<span class="t differs[^"]*" data-tip="([^"]*)">([^<]*)</span>', page)
    assert marked
    for tip, token in marked:
        assert "teacher&#39;s token  " in tip and "entropy" in tip
        assert not tip.endswith(f"teacher&#39;s token  {token}")


def test_sampled_text_cannot_become_markup(tmp_path: Path) -> None:
    hostile = "</span><script>alert('x')</script>\" onmouseover=\"x \ud800 \x00 $\\frac{$"
    sampled = row(
        encode("12<>"),
        of=Task(0, hostile, hostile, hostile, encode("1")),
        logprobs=-np.inf,
        text=hostile,
        verdict=Verdict(0.0, None, hostile),
    )
    signals = TeacherSignals(
        encode("21<>"), np.full(4, np.nan, np.float32), np.full(4, np.nan, np.float32)
    )
    with Sinks(tmp_path, make_config(log=LogConfig(tensorboard=False)), make_tokenizer()) as sinks:
        sinks.log(StepRecord(0, {f"reward/reason/{hostile}": 1}, [sampled], signals))
    assert read_rollouts(rollouts_path(tmp_path, 0))[0]["completion"] == hostile
    page = write_report(tmp_path).read_text()
    assert "<script" not in page and 'onmouseover="' not in page
    assert "&lt;script&gt;" in page and "not finite" in page


def test_long_responses_are_shortened(tmp_path: Path) -> None:
    task = Task(0, "x" * 5000, "1", "", encode("1"))
    long = row([1] * 9000, of=task, logprobs=0.0, text="1" * 9000, finish_reason="length")
    # no tokenizer, no teacher
    with Sinks(tmp_path, make_config(log=LogConfig(tensorboard=False))) as sinks:
        sinks.log(StepRecord(0, {}, [long]))
    page = write_report(tmp_path).read_text()
    assert "8,660 tokens not shown" in page and "cut at the limit" in page and len(page) < 100_000


def test_report_of_traces(tmp_path: Path) -> None:
    task = Task(0, "1+1=?", "2", "1+1=?", encode("1+1=?"), trace="sum 2", trace_ids=encode("sum 2"))
    with Sinks(
        tmp_path,
        make_config("sft", teacher=None, log=LogConfig(tensorboard=False)),
        make_tokenizer(),
    ) as sinks:
        sinks.log(StepRecord(0, {"rollout/completion_tokens/mean": 5.0}, [Row.of_trace(task, 0)]))
    page = write_report(tmp_path).read_text()
    assert '<span class="badge ">trace</span>' in page and "reward 0" not in page


def test_an_annealed_run_shows_the_last_step_the_teacher_scored(tmp_path: Path) -> None:
    with Sinks(tmp_path, make_config(log=LogConfig(tensorboard=False)), make_tokenizer()) as sinks:
        for step in range(4):
            record = make_record(step)
            if step == 3:
                record.teacher = None
                del record.metrics["teacher/entropy/mean"]
            sinks.log(record)
    page = write_report(tmp_path).read_text()
    assert re.findall(r"<h3>Step (\d+)</h3>", page) == ["0", "2"]


def test_report_of_a_run_without_rollouts(tmp_path: Path) -> None:
    config = make_config("sft", teacher=None, log=LogConfig(tensorboard=False))
    with Sinks(tmp_path, config) as sinks:
        (tmp_path / "config.yaml").write_text(dump_config(config))
        for step in range(3):
            sinks.log(
                StepRecord(
                    step,
                    {"train/loss": 2.0 - step, "train/grad_norm": 1.0, "timing/step_seconds": 0.4},
                )
            )
    page = write_report(tmp_path).read_text()
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == {"loss", "grad_norm", "time"}
    assert (
        "stopped after step 3 of 80" in page
        and "<h2>Responses" not in page
        and "teacher <b>" not in page
    )


@pytest.mark.parametrize("num_steps", [0, 1])
def test_report_of_a_run_that_barely_started(tmp_path: Path, num_steps: int) -> None:
    page = write_report(write_run(tmp_path, range(num_steps))).read_text()
    assert ("no step has finished yet" in page) == (num_steps == 0)
    assert ("<h2>Responses" in page) == (num_steps == 1)


def test_series_and_plots_with_gaps() -> None:
    rows: list[Line] = [
        {"step": 0, "train/loss": 1.0},
        {"step": 1},
        {"step": 2, "train/loss": None},
    ]
    steps, values = series(rows, "train/loss")
    assert steps.tolist() == [0, 2] and values[0] == 1.0 and math.isnan(values[1])
    assert [plot.name for plot in draw_plots(rows)] == ["loss"]


def test_many_steps_draw_quickly_and_fully() -> None:
    rows: list[Line] = [
        {"step": step, "timing/step_seconds": 2.0, "timing/train_seconds": 1.0}
        for step in range(5003)
    ]
    assert [plot.name for plot in draw_plots(rows)] == ["time"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not a run directory"),
        ("{\n", r"metrics.jsonl:1: not valid JSON"),
        ("[1]\n", "not a JSON object"),
        ('{"reward/mean": 1}\n', "no integer `step`"),
    ],
)
def test_what_is_not_a_run_directory(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(DataError, match=message) as error:
        write_report(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_the_report_needs_no_torch() -> None:
    code = "import sys, megatron_opd.report.page; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
