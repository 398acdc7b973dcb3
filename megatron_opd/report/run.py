"""What a page reads of a run: its settings as plain keys, and its metrics."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from megatron_opd.errors import DataError
from megatron_opd.metrics.run_directory import Line, metrics_path, read_metrics
from megatron_opd.report.headlines import effort_words, steps_done


@dataclass(frozen=True)
class RunRead:
    """A finished, a running or an interrupted run, of any method."""

    directory: Path
    config: Mapping[str, Any]  # {} where there is none yet
    rows: list[Line]

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.directory.resolve().name)

    @property
    def method(self) -> str:
        method = self.config.get("method")
        return str((method.get("name") if isinstance(method, Mapping) else method) or "")

    @property
    def num_steps(self) -> int | None:
        """The steps that are planned."""
        return self.config.get("num_steps")

    @property
    def done(self) -> bool:
        """True when every step that was planned has finished."""
        return bool(self.rows) and steps_done(self.rows) >= (self.num_steps or 0)

    @property
    def effort(self) -> str:
        """Its steps and minutes in words: "in 100 steps and 2 min 05 s"."""
        return effort_words(self.rows, self.num_steps)


def read_run(run_dir: str | Path) -> RunRead:
    """Raises DataError naming the directory when it is not a run's, or the file that cannot be
    read."""
    run_dir = Path(run_dir)
    if not (metrics_path(run_dir).exists() or (run_dir / "config.yaml").exists()):
        raise DataError(
            f"{run_dir}: not a run directory (no config.yaml, no metrics.jsonl); name one that "
            "train wrote"
        )
    return RunRead(run_dir, _read_config(run_dir / "config.yaml"), read_metrics(run_dir))


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
