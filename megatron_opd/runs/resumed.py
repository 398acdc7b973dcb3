"""What a run that goes on begins with."""

from pathlib import Path
from typing import Any

from megatron_opd.recipe.keys import RunConfig
from megatron_opd.trainer import checkpoint
from megatron_opd.world import processes


def load_newest(config: RunConfig, models: checkpoint.Students) -> tuple[dict[str, Any], list[str]]:
    """Fills the models from the newest whole checkpoint. Returns its state, and lines for the user.
    Collective.

    A run that was stopped before its first one starts again. Raises DataError where all are
    damaged.
    """
    directory = Path(config.directory) / "checkpoints"
    path, lines = processes.from_rank_0(lambda: checkpoint.newest(directory))
    if path is None:
        return {"step": 0}, lines
    state = checkpoint.load(path, models)
    return state, lines + _other_length(config, state)


def _other_length(config: RunConfig, state: dict[str, Any]) -> list[str]:
    """A line where the schedule changes in the middle of the run."""
    settings, before = config.train.optimizer, state.get("num_steps", config.num_steps)
    if before == config.num_steps or settings.schedule == "constant":
        return []
    return [
        f"step {state['step']}: train.optimizer.schedule={settings.schedule} goes on as that of "
        f"num_steps={config.num_steps}, at its rate for this step; until here it was that of "
        f"num_steps={before}"
    ]
