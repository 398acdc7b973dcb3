"""Renders a run directory into PNG plots and one HTML file that needs nothing else."""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_opd.errors import DataError
from megatron_opd.files.atomic import write_atomically
from megatron_opd.metrics.run_directory import Line
from megatron_opd.report.changes import changes_of
from megatron_opd.report.episodes import read_episodes
from megatron_opd.report.evaluations import read_ends
from megatron_opd.report.headlines import headlines_of, steps_done
from megatron_opd.report.plots import draw_plots
from megatron_opd.report.run import read_run
from megatron_opd.report.samples import read_groups
from megatron_opd.report.settings import flatten, settings_of
from megatron_opd.report.sources import read_rewards, read_sets, read_sources
from megatron_opd.report.template import page_template
from megatron_opd.report.terms import read_terms
from megatron_opd.report.verdict import verdict_of

_MAX_WARNINGS = 8


def write_report(run_dir: str | Path, *, running: bool = False, reload_seconds: int = 0) -> Path:
    """Writes `plots/*.png` and `report.html`, whose path it returns.

    The page of a run that is still `running` says so, and reloads itself if it is to.

    Reads a finished, a running or an interrupted run, of any method. Raises DataError naming the
    directory when it is not a run directory, or the file that cannot be read.
    """
    run = read_run(run_dir)
    run_dir = run.directory
    config = run.config
    rows = run.rows
    pair = read_ends(run_dir)
    groups = read_groups(run_dir, rows)
    plots = draw_plots(rows)
    page = page_template(Path(__file__).parent, "report.html.j2").render(
        title=run.name,
        subtitle=_subtitle(config),
        status=_status(config, rows, running=running),
        reload_seconds=reload_seconds,
        verdict=verdict_of(rows, pair, run.effort) if rows else None,
        headlines=headlines_of(config, rows),
        warnings=_warnings(rows),
        reward_warnings=_reward_warnings(rows),
        rewards=read_rewards(rows),
        sources=read_sources(rows),
        sets=read_sets(rows),
        plots=[(plot, base64.b64encode(plot.png).decode()) for plot in plots],
        terms=read_terms(rows),
        changes=changes_of(pair),
        groups=groups,
        steps_of_episodes=read_episodes(run_dir),
        settings=settings_of(config),
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
def _read_environment(path: Path) -> list[tuple[str, str]]:
    if not path.exists():
        return []
    try:
        return list(flatten(json.loads(path.read_text(encoding="utf-8"))))
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


def _status(config: Mapping[str, Any], rows: Sequence[Line], *, running: bool) -> str:
    done = steps_done(rows)
    planned = config.get("num_steps")
    if not rows:
        return "no step has finished yet"
    if running:
        return f"running, {done:,} of {planned or 'an unknown number of'} steps done"
    return f"stopped after step {done} of {planned}" if planned and done < planned else "finished"


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
