"""Renders a run directory into PNG plots and one HTML file that needs nothing else."""

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from megatron_opd.errors import DataError
from megatron_opd.files.atomic import write_atomically
from megatron_opd.metrics.run_directory import Line, metrics_path, read_metrics
from megatron_opd.report.drawing import series
from megatron_opd.report.episodes import read_episodes
from megatron_opd.report.plots import draw_plots
from megatron_opd.report.samples import read_groups
from megatron_opd.report.sources import read_rewards, read_sources
from megatron_opd.report.template import page_template, percent_of

_STEP_SECONDS = "timing/step_seconds"
_MAX_WARNINGS = 8


@dataclass(frozen=True)
class Headline:
    """A number on top of the page."""

    label: str
    value: str
    before: str = ""  # shown with an arrow towards `value`
    detail: str = ""


def write_report(run_dir: str | Path) -> Path:
    """Writes `plots/*.png` and `report.html`, whose path it returns.

    Reads a finished, a running or an interrupted run, of any method. Raises DataError naming the
    directory when it is not a run directory, or the file that cannot be read.
    """
    run_dir = Path(run_dir)
    if not (metrics_path(run_dir).exists() or (run_dir / "config.yaml").exists()):
        raise DataError(
            f"{run_dir}: not a run directory (no config.yaml, no metrics.jsonl); name one that "
            "train wrote"
        )
    config = _read_config(run_dir / "config.yaml")
    rows = read_metrics(run_dir)
    groups = read_groups(run_dir, rows)
    plots = draw_plots(rows)
    page = page_template(Path(__file__).parent, "report.html.j2").render(
        title=config.get("name") or run_dir.resolve().name,
        subtitle=_subtitle(config),
        status=_status(config, rows),
        headlines=_headlines(config, rows),
        warnings=_warnings(rows),
        reward_warnings=_reward_warnings(rows),
        rewards=read_rewards(rows),
        sources=read_sources(rows),
        plots=[(plot, base64.b64encode(plot.png).decode()) for plot in plots],
        groups=groups,
        steps_of_episodes=read_episodes(run_dir),
        settings=_settings(config),
        environment=_read_environment(run_dir / "env.json"),
    )
    report = run_dir / "report.html"
    try:
        (run_dir / "plots").mkdir(exist_ok=True)
        for plot in plots:
            write_atomically(run_dir / "plots" / f"{plot.name}.png", plot.png)
        write_atomically(report, page.encode("utf-8", "replace"))
    except OSError as error:
        raise DataError(
            f"{run_dir}: cannot write the report here ({error.strerror}); make it writable"
        ) from None
    return report


# ------------------------------------------------------------------------------------------ reading
def _read_config(path: Path) -> dict[str, Any]:
    """The recipe as a plain mapping, since a report must not depend on today's keys."""
    if not path.exists():
        return {}
    try:
        config = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError):
        raise DataError(f"{path}: not valid YAML; restore the file that train wrote") from None
    if not isinstance(config, dict):
        raise DataError(f"{path}: not a mapping; restore the file that train wrote")
    return config


def _read_environment(path: Path) -> list[tuple[str, str]]:
    if not path.exists():
        return []
    try:
        return list(_flatten(json.loads(path.read_text(encoding="utf-8"))))
    except ValueError:
        raise DataError(
            f"{path}: not valid JSON; delete it or restore the file that train wrote"
        ) from None


# ----------------------------------------------------------------------------- the page's sentences
def _subtitle(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    method = config.get("method")
    names = {"method": method.get("name") if isinstance(method, Mapping) else method}
    for role in ("student", "teacher"):
        # Two names, since the last one alone may be "hf".
        names[role] = "/".join(Path((config.get(role) or {}).get("path", "")).parts[-2:])
    return [(role, str(name)) for role, name in names.items() if name]


def _status(config: Mapping[str, Any], rows: Sequence[Line]) -> str:
    done = _steps_done(rows)
    planned = config.get("num_steps")
    if not rows:
        return "no step has finished yet"
    return f"stopped after step {done} of {planned}" if planned and done < planned else "finished"


def _steps_done(rows: Sequence[Line]) -> int:
    """The number of steps; lines without a step time are evaluations between steps."""
    return max((row["step"] + (_STEP_SECONDS in row) for row in rows), default=0)


def _headlines(config: Mapping[str, Any], rows: Sequence[Line]) -> list[Headline]:
    cards = []
    _, accuracy = series(rows, "eval/accuracy")
    if len(accuracy) >= 2:
        gain = f"{100 * (accuracy[-1] - accuracy[0]):+.1f} points"
        detail = ", ".join([gain, *_interval(rows)])
        first = percent_of(accuracy[0])
        last = percent_of(accuracy[-1])
        cards.append(Headline("Held-out accuracy", last, first, detail))
    elif len(accuracy):
        detail = ", ".join(_interval(rows))
        cards.append(Headline("Held-out accuracy", percent_of(accuracy[0]), detail=detail))
    cards += _skill_headline(rows) + _answer_headlines(rows)
    _, reward = series(rows, "reward/mean")
    if len(reward) >= 2:
        first = f"{reward[0]:.3f}"
        last = f"{reward[-1]:.3f}"
        cards.append(Headline("Training reward", last, first, "first and last step"))
    _, agreement = series(rows, "teacher/agreement/mean")
    if len(agreement) >= 2:
        detail = "tokens that are the teacher's argmax"
        first = percent_of(agreement[0])
        last = percent_of(agreement[-1])
        cards.append(Headline("Teacher agreement", last, first, detail))
    detail = f"of {config['num_steps']:,}" if config else ""
    cards.append(Headline("Steps", f"{_steps_done(rows):,}", detail=detail))
    _, seconds = series(rows, _STEP_SECONDS)
    if len(seconds):
        detail = f"{seconds.mean():.2f} s per step"
        cards.append(Headline("Time in steps", _duration(seconds.sum()), detail=detail))
    return cards + _token_headline(config, rows)


def _skill_headline(rows: Sequence[Line]) -> list[Headline]:
    """The first and last success of the student with skills to read, as a teacher reads them."""
    _, accuracy = series(rows, "eval/with_skills/accuracy")
    if not len(accuracy):
        return []
    before = percent_of(accuracy[0]) if len(accuracy) >= 2 else ""
    return [Headline("With skills", percent_of(accuracy[-1]), before, "held out")]


def _interval(rows: Sequence[Line]) -> list[str]:
    """The last evaluation's interval in words; [] for runs of earlier versions, which have none."""
    evaluations = [row for row in rows if "eval/accuracy/low" in row]
    if not evaluations:
        return []
    last = evaluations[-1]
    low = 100 * last["eval/accuracy/low"]
    high = 100 * last["eval/accuracy/high"]
    return [f"95 %: {low:.1f} to {high:.1f}, n = {last['eval/prompts']}"]


def _answer_headlines(rows: Sequence[Line]) -> list[Headline]:
    """The first and last fraction of completions without an answer.

    They are of held-out prompts if these were evaluated, else of training.
    """
    for place, prefix, rollout in (
        ("held out", "eval", "eval"),
        ("in training", "reward", "rollout"),
    ):
        _, unanswered = series(rows, f"{prefix}/unanswered/mean")
        _, truncated = series(rows, f"{rollout}/truncated/mean")
        if len(unanswered) and len(truncated):
            before = percent_of(unanswered[0]) if len(unanswered) >= 2 else ""
            detail = f"{place}, {percent_of(truncated[-1])} cut off at the token limit"
            return [Headline("Without an answer", percent_of(unanswered[-1]), before, detail)]
    return []


def _token_headline(config: Mapping[str, Any], rows: Sequence[Line]) -> list[Headline]:
    _, mean_tokens = series(rows, "rollout/completion_tokens/mean")
    rollout = config.get("rollout") or {}
    if not len(mean_tokens) or not {"num_prompts", "samples_per_prompt"} <= rollout.keys():
        return []
    sampled = any("rollout/policy_version" in row for row in rows)
    responses = rollout["num_prompts"] * (rollout["samples_per_prompt"] if sampled else 1)
    detail = f"in {responses * len(mean_tokens):,} responses"
    label = "Tokens sampled" if sampled else "Tokens read"
    return [Headline(label, _count(mean_tokens.sum() * responses), detail=detail)]


def _warnings(rows: Sequence[Line]) -> list[str]:
    """Numbers that were not finite, of the first steps that had some."""
    lines = [f"step {row['step']}: {row['nonfinite']}" for row in rows if row.get("nonfinite")]
    if len(lines) <= _MAX_WARNINGS:
        return lines
    return [*lines[:_MAX_WARNINGS], f"and {len(lines) - _MAX_WARNINGS} more steps"]


def _reward_warnings(rows: Sequence[Line]) -> list[str]:
    """The causes of rewards of 0 that are not the fault of the answers."""
    kinds = {
        "reward/bad_gold": "prompts had a gold answer that nothing can be compared with",
        "reward/reason/over_budget": "answers were not judged within reward.budget_seconds",
    }
    warnings = []
    for key, words in kinds.items():
        total = sum(row.get(key) or 0 for row in rows)
        if total:
            warnings.append(f"{total:,.0f} {words}; their rewards are 0")
    return warnings


def _settings(config: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Sections of keys and values: the recipe's plain keys first, then one for each mapping."""
    plain = []
    sections = []
    for key, value in config.items():
        if not isinstance(value, Mapping):
            plain.append((key, _text(value)))
        elif value:
            sections.append((key, list(_flatten(value))))
    return [("run", plain), *sections] if plain else sections


def _flatten(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _text(value)


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _count(number: float) -> str:
    for unit, size in (("billion", 1e9), ("million", 1e6)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:,.0f}"
