"""Every check that can be made before a process group or a device is touched. Imports no torch itself."""

from pathlib import Path

from megatron_opd.config.check import check_run_directory, preflight
from megatron_opd.config.load import load_config
from megatron_opd.config.plan import plan
from megatron_opd.config.schema import RunConfig
from megatron_opd.config.validate import differences
from megatron_opd.errors import ConfigError
from megatron_opd.manifest import checkpoint_steps
from megatron_opd.prompts.data import load_heldout, load_training
from megatron_opd.prompts.tokenizer import load_tokenizer

# Keys that a resumed run may change.
RESUMABLE = (
    "num_steps", "checkpoint", "log", "eval", "run_dir", "student.layout", "teacher.layout",
    "rollout.processes", "teacher.processes", "train.micro_batch_tokens", "train.recompute_granularity",
    "train.fused_output_layer",
)  # fmt: skip


def check_recipe(config: RunConfig, *, world_size: int | None) -> list[str]:
    """The recipe, the model directories and the data files; returns warnings. Raises ConfigError, DataError."""
    warnings = preflight(config, world_size=world_size)
    return warnings + check_data(config)


def check_data(config: RunConfig) -> list[str]:
    """Reads the data files as the run will."""
    tokenizer, needs = load_tokenizer(config.student.path), plan(config.method)
    prompts = load_training(config, tokenizer, need_answer=needs.rewards, need_trace=needs.traces)
    if config.data.heldout is not None:
        load_heldout(config, tokenizer)
    if len(prompts) < config.rollout.num_prompts:
        return [f"rollout.num_prompts: one step takes more prompts than the {len(prompts)} of {config.data.train}"]
    if config.method.max_refills and len(prompts) < 2 * config.rollout.num_prompts:
        return [
            f"method.max_refills: the {len(prompts)} prompts of {config.data.train} are fewer than two steps take, so "
            "a step's refills draw its prompts again, for further samples"
        ]
    return []


def check_resumed(config: RunConfig) -> None:
    """A resumed run keeps its recipe. Raises ConfigError naming the key that differs from the stored one."""
    stored_file = Path(config.directory) / "config.yaml"
    check_run_directory(config, resume=True)
    stored = load_config(str(stored_file))
    changed = [key for key in differences(stored, config) if not _may_change(key)]
    if changed:
        may = ", ".join(key for key in RESUMABLE if key != "run_dir")
        raise ConfigError(f"{changed[0]}: differs from {stored_file}; a resumed run may change only {may}")
    done = checkpoint_steps(Path(config.directory) / "checkpoints")
    if done and config.num_steps < max(done):
        earlier = [step for step in done if step <= config.num_steps]
        weights = done[max(earlier)] if earlier else f"{config.directory}/checkpoints/step-NNNNNN"
        raise ConfigError(
            f"num_steps: {config.num_steps} is below the {max(done)} steps that {config.directory} has done; give "
            f"num_steps={max(done)} or more (the weights of an earlier step: megatron-opd convert {weights} OUT)"
        )


def _may_change(key: str) -> bool:
    return any(f"{key}.".startswith(f"{resumable}.") for resumable in RESUMABLE)
