"""The progress of a run: a live table on a terminal, one plain line per step anywhere else."""

import math
from collections import deque
from collections.abc import Mapping
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_opd.recipe.keys import RunConfig

Metrics = Mapping[str, float]

# Heading in the table, word in the plain line, metric, format.
_COLUMNS = (
    ("reward", "reward", "reward/mean", ".3f"),
    ("no answer", "no answer", "reward/unanswered/mean", ".1%"),
    ("cut off", "cut off", "rollout/truncated/mean", ".1%"),
    ("bad golds", "bad golds", "reward/bad_gold", ".0f"),
    ("held-out", "held-out", "eval/accuracy", ".3f"),
    ("tokens", "tokens", "rollout/completion_tokens/mean", ".1f"),
    ("loss", "loss", "train/loss", ".4g"),
    ("grad norm", "grad", "train/grad_norm", ".3g"),
    ("guidance", "w", "objective/guidance/weight", ".3g"),
)
_SHOWN_UNLESS_ZERO = ("reward/unanswered/mean", "rollout/truncated/mean", "reward/bad_gold")
_STEP_SECONDS = "timing/step_seconds"
_PHASES = ("generate", "reward", "gather", "teacher", "train", "refit", "checkpoint", "eval")
_RECENT = 10  # steps in the table, and in the estimate of the remaining time


class StepConsole(Protocol):
    """Shows the steps of a run, and notes between them."""

    def log(self, step: int, metrics: Metrics) -> None: ...
    def note(self, text: str) -> None: ...
    def close(self) -> None: ...


def open_console(config: RunConfig, console: Console | None = None) -> StepConsole:
    """A console that suits the output, which is standard output unless `console` is given."""
    return open_table(f"{config.name} · {config.method.name}", config.num_steps, console)


def open_table(title: str, num_steps: int, console: Console | None = None) -> StepConsole:
    """The same for steps of which no recipe is at hand."""
    console = console or Console(highlight=False, soft_wrap=True)
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveConsole(console, title, num_steps)
    return PlainConsole(console, num_steps)


class PlainConsole:
    """One line per step."""

    def __init__(self, console: Console, num_steps: int) -> None:
        self._console = console
        self._num_steps = num_steps

    def log(self, step: int, metrics: Metrics) -> None:
        words = [f"step {step}/{self._num_steps}"]
        in_words = "eval/accuracy/low" in metrics
        for _, word, key, spec in _COLUMNS:
            if _is_shown(key, metrics) and not (in_words and key == "eval/accuracy"):
                words.append(f"{word} {metrics[key]:{spec}}")
        if in_words:
            words.append(f"[{held_out_words(metrics)}]")
        words += [f"[{text}]" for text in (*set_words(metrics), *suite_words(metrics))]
        if _STEP_SECONDS in metrics:
            words.append(_seconds(metrics[_STEP_SECONDS]) + " s")
        phases = [f"{name} {_seconds(value)}" for name, value in _phase_seconds(metrics).items()]
        if phases:
            words.append(f"({' '.join(phases)})")
        self.note(" ".join(words))

    def note(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)
        self._console.file.flush()

    def close(self) -> None:
        pass


class LiveConsole:
    """The last steps as a table over a progress bar, redrawn after each step.

    It refreshes without a thread of its own: the process forks verifier workers, and a fork must
    not copy a lock that another thread has taken.
    """

    def __init__(self, console: Console, title: str, num_steps: int) -> None:
        self._title = title
        self._num_steps = num_steps
        self._rows: deque[tuple[int, Metrics]] = deque(maxlen=_RECENT)
        self._live = Live(console=console, auto_refresh=False)

    def log(self, step: int, metrics: Metrics) -> None:
        self._rows.append((step, metrics))
        if "eval/accuracy/low" in metrics:
            self.note(held_out_words(metrics))
        for text in (*set_words(metrics), *suite_words(metrics)):
            self.note(text)
        # Started at the first step, so that lines of the start stay above. Later calls do nothing.
        self._live.start()
        self._live.update(Group(self._table(), self._progress()), refresh=True)

    def note(self, text: str) -> None:
        self._live.console.print(Text(text), soft_wrap=True)

    def close(self) -> None:
        self._live.stop()

    def _table(self) -> Table:
        shown = [metrics for _, metrics in self._rows]
        columns = [c for c in _COLUMNS if any(_is_shown(c[2], metrics) for metrics in shown)]
        title = Text(self._title, style="bold")
        table = Table(title=title, title_justify="left", border_style="dim")
        for heading in ("step", *(column[0] for column in columns), "s/step"):
            table.add_column(heading, justify="right")
        for step, metrics in self._rows:
            cells = [_cell(metrics.get(key), spec) for _, _, key, spec in columns]
            table.add_row(str(step), *cells, _cell(metrics.get(_STEP_SECONDS), ".2f"))
        return table

    def _progress(self) -> Table:
        step, metrics = self._rows[-1]
        # A line without a time is an evaluation.
        done = min(step + (_STEP_SECONDS in metrics), self._num_steps)
        line = Table.grid(padding=(0, 2))
        line.add_row(
            ProgressBar(total=self._num_steps, completed=done, width=40),
            f"{done}/{self._num_steps} steps",
            Text(self._remaining(self._num_steps - done), style="dim"),
        )
        return line

    def _remaining(self, steps: int) -> str:
        recent = [metrics[_STEP_SECONDS] for _, metrics in self._rows if _STEP_SECONDS in metrics]
        if not recent or not steps:
            return ""
        return f"{_clock(steps * sum(recent) / len(recent))} left"


def suite_words(metrics: Metrics) -> list[str]:
    """The score of every benchmark suite, with its interval."""
    texts = []
    for key, score in metrics.items():
        if key.startswith("suite/") and key.endswith("/score"):
            low = metrics[f"{key}/low"]
            high = metrics[f"{key}/high"]
            name = key.split("/")[1]
            texts.append(f"{name} {score:.1%}, 95 % {low:.1%} to {high:.1%}")
    return texts


def set_words(metrics: Metrics) -> list[str]:
    """The accuracy on every further held-out set, with its interval."""
    texts = []
    for key, accuracy in metrics.items():
        if key.startswith("eval/set/") and key.endswith("/accuracy") and key.count("/") == 3:
            low = metrics[f"{key}/low"]
            high = metrics[f"{key}/high"]
            texts.append(f"{key.split('/')[2]} {accuracy:.1%}, 95 % {low:.1%} to {high:.1%}")
    return texts


def held_out_words(metrics: Metrics) -> str:
    """The held-out accuracy with its interval, number of prompts and failures."""
    low = metrics["eval/accuracy/low"]
    high = metrics["eval/accuracy/high"]
    words = f"held-out accuracy {metrics['eval/accuracy']:.1%}, 95 % {low:.1%} to {high:.1%}"
    words += f", {metrics['eval/prompts']:.0f} prompts"
    words += f", {metrics['eval/unanswered/mean']:.1%} without an answer"
    words += f", {metrics['eval/truncated/mean']:.1%} cut off"
    if metrics["eval/bad_gold"]:
        words += f", {metrics['eval/bad_gold']:.0f} bad gold answers"
    return words


def _is_shown(key: str, metrics: Metrics) -> bool:
    return key in metrics and not (key in _SHOWN_UNLESS_ZERO and metrics[key] == 0)


def _cell(value: float | None, spec: str) -> Text:
    if value is None:
        return Text("")
    return Text(f"{value:{spec}}", style="" if math.isfinite(value) else "bold red")


def _phase_seconds(metrics: Metrics) -> dict[str, float]:
    keys = {name: f"timing/{name}_seconds" for name in _PHASES}
    return {name: metrics[key] for name, key in keys.items() if key in metrics}


def _seconds(value: float) -> str:
    return f"{value:.1f}" if value >= 0.1 else f"{value:.2f}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
