"""The state of a run beside its models, and its return when a run goes on."""

from dataclasses import dataclass, field
from pathlib import Path

from megatron_opd.recipe.keys import RunConfig
from megatron_opd.trainer import checkpoint
from megatron_opd.world import processes


@dataclass(frozen=True)
class State:
    """The state of a run that a checkpoint keeps beside the models."""

    step: int  # steps done
    source: dict[str, int]  # the task source's cursor
    skipped_in_a_row: int  # updates
    num_steps: int  # the recipe's, when the checkpoint was written
    # what the retriever of skills has learned, {} where there is none
    retriever: dict[str, object] = field(default_factory=dict)


def load_newest(config: RunConfig, models: checkpoint.Models) -> tuple[State | None, list[str]]:
    """Fills the models from the newest whole checkpoint. Collective.

    Returns its state, and lines for the user. The state is None for a run without a checkpoint,
    which starts again. Raises DataError when all checkpoints are damaged.
    """
    directory = Path(config.directory) / "checkpoints"
    path, lines = processes.from_rank_0(lambda: checkpoint.newest(directory))
    if path is None:
        return None, lines
    stored = checkpoint.load(path, models)
    num_steps = stored.get("num_steps", config.num_steps)
    state = State(
        stored["step"],
        stored["source"],
        stored["skipped_in_a_row"],
        num_steps,
        stored.get("retriever", {}),
    )
    return state, lines + _other_length(config, state)


def _other_length(config: RunConfig, state: State) -> list[str]:
    """A line if the learning-rate schedule changes in the middle of the run."""
    settings = config.train.optimizer
    if state.num_steps == config.num_steps or settings.schedule == "constant":
        return []
    return [
        f"step {state.step}: train.optimizer.schedule={settings.schedule} goes on as that of "
        f"num_steps={config.num_steps}, at its rate for this step; until here it was that of "
        f"num_steps={state.num_steps}"
    ]
