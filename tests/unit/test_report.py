"""What a page says of a run: the verdict, the terms, before and after, what was set."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from megatron_opd.cli import main as cli
from megatron_opd.errors import ConfigError, DataError
from megatron_opd.metrics.run_directory import Line, encode_line, heldout_path
from megatron_opd.recipe.load import dump_config, load_config
from megatron_opd.report.comparison import curves
from megatron_opd.report.comparison_page import write_comparison
from megatron_opd.report.evaluations import read_ends
from megatron_opd.report.page import write_report
from megatron_opd.report.plots import PLOTS, WIDE, draw_plots, figure_of
from megatron_opd.report.run import read_run
from megatron_opd.report.settings import settings_of
from megatron_opd.report.terms import facts_of, read_terms, term_plots
from megatron_opd.report.verdict import verdict_of

NUM_PROBLEMS = 40


def answers(
    right: Sequence[Sequence[bool]], problems: Sequence[str] | None = None, **more: Any
) -> list[Line]:
    """The rows of an evaluation; of every problem, which of its answers are right."""
    names = problems or [f"problem {index}" for index in range(len(right))]
    return [
        {
            "prompt_index": index,
            "sample": sample,
            "problem": name,
            "answer": "7",
            "completion": f"it is {7 if is_right else 8}",
            "reward": float(is_right),
            "reward_reason": "correct" if is_right else "wrong",
            **more,
        }
        for index, (name, samples) in enumerate(zip(names, right, strict=True))
        for sample, is_right in enumerate(samples)
    ]


def write_run(
    run_dir: Path,
    heldout: Mapping[int, Sequence[Line]],
    steps: int = 20,
    metrics: Mapping[str, float] | None = None,
    evaluated: Mapping[int, float] | None = None,
) -> Path:
    """A finished run of `steps` with the answers and accuracies of evaluations."""
    run_dir.mkdir(parents=True, exist_ok=True)
    lines = []
    for step in range(steps + 1):
        line: Line = {"step": step}
        if step in (evaluated or {}):
            line["eval/accuracy"] = (evaluated or {})[step]
        if step < steps:
            line |= {"timing/step_seconds": 6.0, "reward/mean": step / steps} | dict(metrics or {})
        if len(line) > 1:
            lines.append(encode_line(line))
    (run_dir / "metrics.jsonl").write_bytes(b"".join(lines))
    for step, rows in heldout.items():
        path = heldout_path(run_dir, step)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"".join(map(encode_line, rows)))
    return run_dir


def some_right(count: int, of: int = NUM_PROBLEMS) -> list[list[bool]]:
    return [[index < count] for index in range(of)]


def sentence(run_dir: Path) -> tuple[str, str]:
    run = read_run(run_dir)
    verdict = verdict_of(run.rows, read_ends(run_dir), run.effort)
    return verdict.kind, verdict.sentence


# ----------------------------------------------------------------------------------------- verdict
@pytest.mark.parametrize(
    ("before", "after", "kind", "words"),
    [
        (10, 30, "better", "rose from 25.0% to 75.0% in 20 steps and 2 min 00 s: +50.0 points (95"),
        (30, 10, "worse", "fell from 75.0% to 25.0%"),
        (10, 12, "open", "No certain change in 20 steps and 2 min 00 s: held-out accuracy was 25"),
        (10, 10, "open", "+0.0 points"),
    ],
)
def test_a_verdict_is_as_certain_as_its_problems(
    tmp_path: Path, before: int, after: int, kind: str, words: str
) -> None:
    heldout = {0: answers(some_right(before)), 20: answers(some_right(after))}
    run_dir = write_run(tmp_path / "run", heldout)
    said = sentence(run_dir)
    assert said[0] == kind and words in said[1]
    assert said[1].replace("+", "&#43;") in write_report(run_dir).read_text().replace("+", "&#43;")


def test_few_problems_say_nothing_for_certain(tmp_path: Path) -> None:
    heldout = {0: answers(some_right(0, of=3)), 20: answers(some_right(3, of=3))}
    assert sentence(write_run(tmp_path, heldout))[0] == "open"


def test_a_verdict_without_answers_claims_nothing(tmp_path: Path) -> None:
    accuracies = {0: 0.2, 20: 0.9}
    kind, words = sentence(write_run(tmp_path / "unpaired", {}, evaluated=accuracies))
    assert kind == "open" and "20.0% and is 90.0%" in words and "cannot be said" in words
    kind, words = sentence(write_run(tmp_path / "once", {}, evaluated={0: 0.2}))
    assert kind == "open" and "evaluated once" in words
    kind, words = sentence(write_run(tmp_path / "never", {}))
    assert kind == "open" and "from 0.100 to 0.850" in words and "nothing was evaluated" in words
    other = {0: answers(some_right(1)), 20: answers(some_right(9), ["other"] * NUM_PROBLEMS)}
    kind, words = sentence(write_run(tmp_path / "other", other, evaluated=accuracies))
    assert kind == "open" and "cannot be said" in words


def test_a_file_of_other_rows_is_named(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, {0: answers(some_right(1)), 20: [{"prompt_index": 0}]})
    with pytest.raises(DataError, match=r"step-000020.jsonl: a row has no `sample`"):
        write_report(run_dir)


def test_correct_is_what_the_row_says_not_its_reason(tmp_path: Path) -> None:
    """A reward of one's own has other words; an environment that failed says nothing."""
    before = answers(some_right(0), correct=False)
    after = answers(some_right(0), correct=True)
    kind, words = sentence(write_run(tmp_path / "own", {0: before, 20: after}))
    assert kind == "better" and "to 100.0%" in words
    failed = answers([[False]] * 5, ended="failed")
    rest = answers(some_right(20, of=NUM_PROBLEMS))
    spoilt = [*failed, *rest[5:]]
    pair = read_ends(write_run(tmp_path / "failed", {0: rest, 20: spoilt}))
    assert pair is not None and len(pair.keys) == NUM_PROBLEMS - 5
    assert pair.difference.mean == 0


# ------------------------------------------------------------------------------- before and after
def test_problems_are_shown_before_and_after(tmp_path: Path) -> None:
    before = [[False, False], [True, True], [True, True], [False, False], [True, False]]
    after = [[True, False], [False, False], [True, True], [False, False], [True, False]]
    names = ["gain <b>", "loss", "kept", "never", "half"]
    run_dir = write_run(tmp_path, {0: answers(before, names), 20: answers(after, names)})
    page = write_report(run_dir).read_text()
    section = page[page.index("Before and after") :]
    for words in ("1 gained", "1 lost", "1 still right", "1 still wrong", "1 as before"):
        assert words in section
    gained = section[section.index("gain &lt;b&gt;") : section.index("never")]
    assert gained.index("it is 8") < gained.index("it is 7")
    assert "0 of 2 right" in gained and "1 of 2 right" in gained
    lost = section[section.index('"problem">loss') :]
    assert lost.index("it is 7") < lost.index("it is 8")


def test_an_episode_is_shown_by_what_it_saw_and_did(tmp_path: Path) -> None:
    turn = {"observation": "a hall", "action": "open box", "valid": False, "reward": 0.0}
    before = answers(some_right(0), exchanges=[turn], task_type="", skill="", ended="turns")
    after = answers(some_right(40), exchanges=[turn], task_type="", skill="", ended="won")
    page = write_report(write_run(tmp_path, {0: before, 20: after})).read_text()
    assert "sees a hall\n  does open box (not valid)" in page


# ------------------------------------------------------------------------------------------- terms
def rows_of_terms(steps: int = 8) -> list[Line]:
    return [
        {
            "step": step,
            "train/loss": 1.0,
            "objective/of/my/own/loss": 2.0 - step,
            "objective/of/my/own/weight": 0.5,
            "objective/policy/loss": 0.25,
            "objective/policy/weight": 2.0 - step / 10,
            "objective/policy/clip_fraction": 0.0,
            "objective/policy/gate": step / 10,
            "objective/policy/new_fact": None if step == 3 else float(step),
        }
        for step in range(steps)
    ]


def test_plots_are_of_whatever_terms_and_facts_there_are() -> None:
    rows = rows_of_terms()
    assert facts_of(rows) == {
        "weight": ["of/my/own", "policy"],
        "loss": ["of/my/own", "policy"],
        "gate": ["policy"],
        "clip_fraction": ["policy"],
        "new_fact": ["policy"],
    }
    names = [name for name, _, _ in term_plots(rows)]
    # Nothing was clipped at any step: that stands in the table.
    assert names == ["term_weight", "term_loss", "term_gate", "term_new_fact"]
    assert {plot.name for plot in draw_plots(rows)} == {"loss", *names}
    table = read_terms(rows)
    assert table is not None
    assert table.facts == ["weight", "loss", "gate", "clipped", "new fact"]
    assert dict(table.rows)["policy"][:4] == [
        ("1.95", "1.35"), ("", "0.25"), ("0.05", "0.65"), ("", "0"),
    ]  # fmt: skip
    assert dict(table.rows)["of/my/own"][2] == ("", "")


def test_one_term_needs_no_plot_of_its_loss() -> None:
    rows = [{"step": s, "objective/t/loss": s, "objective/t/weight": 1.0} for s in range(5)]
    assert term_plots(rows) == [] and read_terms([{"step": 0, "train/loss": 1.0}]) is None


# ---------------------------------------------------------------------------------------- settings
def test_settings_are_those_that_differ(tmp_path: Path) -> None:
    config = load_config("demo", ["num_steps=7", "method.guidance.weight.start=3"])
    run_dir = write_run(tmp_path / "run", {})
    (run_dir / "config.yaml").write_text(dump_config(config))
    settings = settings_of(read_run(run_dir).config)
    changed = {setting.key: setting for setting in settings.changed}
    assert settings.recipe == "demo"
    assert changed["num_steps"].recipe == "100" and changed["num_steps"].value == "7"
    weight = changed["method.terms.guidance.weight.start"]
    assert (weight.value, weight.recipe, weight.default) == ("3", "10", "0.002")
    assert changed["eval.every"].recipe is None and changed["eval.every"].default == "0"
    assert not {"rollout.temperature", "train.optimizer.clip_grad"} & changed.keys()
    page = write_report(run_dir).read_text()
    assert "recipe demo" in page and "All settings" in page


def test_settings_of_another_version_are_shown_whole() -> None:
    settings = settings_of({"name": "old", "sampler": {"depth": 3}})
    assert settings.changed == [] and ("sampler", [("depth", "3")]) in settings.sections
    named = settings_of(json.loads(json.dumps(dataclasses.asdict(load_config("demo")))))
    assert named.recipe == ""


# ------------------------------------------------------------------------------------------- drawn
def rows_of_long_names() -> list[Line]:
    reasons = ("correct", "wrong", "no_answer", "cut_at_the_limit", "over_budget", "bad_gold")
    rows: list[Line] = []
    for step in range(40):
        row: Line = {"step": step, "reward/mean": 0.9, "timing/step_seconds": 90.0 - 2 * step}
        row |= {f"reward/reason/{reason}": 1 + step for reason in reasons}
        row |= {f"objective/a_long_name_of_term_{n}/gate": step + n for n in range(6)}
        row |= {f"timing/{name}_seconds": 1.0 for name in ("generate", "teacher", "train", "eval")}
        if step % 10 == 0:
            row |= {"eval/accuracy": 0.9, "eval/with_skills/accuracy": 0.9}
        rows.append(row)
    return rows


def test_labels_cover_no_curve_and_are_not_cut_off() -> None:
    rows = rows_of_long_names()
    drawings = {name: draw for name, _, draw in [*PLOTS, *term_plots(rows)]}
    drawn = {name: figure_of(draw, rows, wide=name in WIDE) for name, draw in drawings.items()}
    assert {"reward", "reasons", "time", "term_gate"} <= {name for name in drawn if drawn[name]}
    for name, figure in drawn.items():
        if figure is None:
            continue
        FigureCanvasAgg(figure).draw()
        axes = figure.axes[0]
        assert not axes.texts, f"{name} has words within its axes"
        for legend in figure.legends:
            box = legend.get_window_extent()
            assert box.y0 >= axes.get_window_extent().y1, f"{name}: the legend is over the axes"
            assert box.x1 <= figure.bbox.x1 + 1, f"{name}: the legend is cut off"


# ------------------------------------------------------------------------------------- comparisons
def test_runs_are_compared_on_the_problems_that_both_have(tmp_path: Path) -> None:
    names = [f"problem {index}" for index in range(NUM_PROBLEMS)]
    base = write_run(tmp_path / "base", {20: answers(some_right(10), names)})
    # The first ten problems are the base's last ten, right in both; the others are its own.
    shifted = [f"problem {index}" for index in range(30, 30 + NUM_PROBLEMS)]
    other = write_run(tmp_path / "other", {20: answers(some_right(10), shifted)})
    apart = write_run(tmp_path / "apart", {20: answers(some_right(10), ["x"] * NUM_PROBLEMS)})
    never = write_run(tmp_path / "never", {})
    better = write_run(tmp_path / "better", {20: answers(some_right(35), names)})
    page, comparison = write_comparison([base, other, apart, never, better])
    kinds = {one.label: (one.kind, one.difference, one.problems) for one in comparison.against}
    assert kinds == {
        "other": ("better", "+100.0", "10"),
        "apart": ("open", "", "0"),
        "never": ("open", "", "0"),
        "better": ("better", "+62.5", "40"),
    }
    assert "no held-out problems in common" in comparison.against[1].sentence
    assert page == tmp_path / "report-base-other-apart-never-better.html"
    text = page.read_text()
    assert all(one.sentence.split("(")[0] in text for one in comparison.against)
    assert "<script" not in text and "reward" in text


def test_many_runs_need_more_evidence(tmp_path: Path) -> None:
    """Holm's correction: what would be certain of one run is not of the best of many."""
    base = write_run(tmp_path / "base", {20: answers(some_right(10))})
    runs = [write_run(tmp_path / f"r{n}", {20: answers(some_right(17))}) for n in range(5)]
    assert write_comparison([base, runs[0]])[1].against[0].kind == "better"
    against = write_comparison([base, *runs])[1].against
    assert {one.kind for one in against} == {"open"} and len(against) == 5


def test_a_comparison_says_what_was_unlike(tmp_path: Path) -> None:
    runs = []
    for folder, overrides in (("a", []), ("b", ["eval.temperature=1", "seed=3"])):
        config = load_config("demo", [*overrides, f"run_dir=runs/{folder}"])
        run = write_run(tmp_path / folder / "run", {20: answers(some_right(10))})
        (run / "config.yaml").write_text(dump_config(config))
        runs.append(run)
    comparison = write_comparison(runs, tmp_path / "page.html")[1]
    assert dict(comparison.settings) == {"eval.temperature": ["0", "1"], "seed": ["0", "3"]}
    assert "eval.temperature" in comparison.notes[0]
    assert [run.label for run in comparison.runs] == [str(run) for run in runs]


def test_curves_of_runs_share_their_axes(tmp_path: Path) -> None:
    accuracies = {0: 0.2, 20: 0.9}
    paths = [write_run(tmp_path / name, {}, evaluated=accuracies) for name in ("a", "b")]
    runs = [read_run(path) for path in paths]
    drawings = {name: draw for name, _, draw in curves(runs)}
    figure = figure_of(drawings["eval_accuracy"], [])
    assert figure is not None
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert labels == ["a", "b"]
    assert figure_of(drawings["train_loss"], []) is None


def test_a_comparison_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    base = write_run(tmp_path / "base", {})
    other = write_run(tmp_path / "other", {})
    (tmp_path / "mine.html").write_text("kept")
    for runs, out, message in (
        ([base, base], None, "named twice"),
        ([base, tmp_path / "absent"], None, "absent: not a run directory"),
        ([base, other], tmp_path / "mine.html", "mine.html is not a page of this command"),
        ([base, other], tmp_path, "is a directory; name a file"),
        ([base, other], tmp_path / "no" / "page.html", "is no directory"),
    ):
        with pytest.raises((ConfigError, DataError), match=message):
            write_comparison(runs, out)
    assert (tmp_path / "mine.html").read_text() == "kept"
    out = tmp_path / "page.html"
    assert cli.main(["report", str(base), str(other), "--out", str(out)]) == 0 and out.is_file()
    assert cli.main(["report", str(base), "--out", str(out)]) == 2
