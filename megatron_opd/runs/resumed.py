"""Where a run stands, beside its models, and what a run that goes on begins with."""

from dataclasses import dataclass
from pathlib import Path

from megatron_opd.recipe.keys import RunConfig
from megatron_opd.trainer import checkpoint
from megatron_opd.world import processes


@dataclass(frozen=True)
class State:
    """What a checkpoint keeps of a run, beside the models."""

    step: int  # steps done
    source: dict[str, int]  # the task source's cursor
    skipped_in_a_row: int  # updates
    num_steps: int  # that the run was to have


def load_newest(config: RunConfig, models: checkpoint.Students) -> tuple[State | None, list[str]]:
    """Fills the models from the newest whole checkpoint. Returns its state, and lines for the user.
    Collective.

    None for a run that was stopped before its first one: it starts again. Raises DataError where
    all are damaged.
    """
    directory = Path(config.directory) / "checkpoints"
    path, lines = processes.from_rank_0(lambda: checkpoint.newest(directory))
    if path is None:
        return None, lines
    stored = checkpoint.load(path, models)
    num_steps = stored.get("num_steps", config.num_steps)
    state = State(stored["step"], stored["source"], stored["skipped_in_a_row"], num_steps)
    return state, lines + _other_length(config, state)


def _other_length(config: RunConfig, state: State) -> list[str]:
    """A line where the schedule changes in the middle of the run."""
    settings = config.train.optimizer
    if state.num_steps == config.num_steps or settings.schedule == "constant":
        return []
    return [
        f"step {state.step}: train.optimizer.schedule={settings.schedule} goes on as that of "
        f"num_steps={config.num_steps}, at its rate for this step; until here it was that of "
        f"num_steps={state.num_steps}"
    ]
