"""The keys of a recipe as frozen dataclasses; `load.py` validates a mapping into a `RunConfig`.

A key that has no default must be in the recipe. Comments give units; docs/config.md is generated
from this file and from `terms.py`, which has the keys of a method.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from megatron_opd.architectures.config import ModelConfig
from megatron_opd.contracts.ranges import (
    Fraction,
    Gibibytes,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    Temperature,
)
from megatron_opd.methods.method import MethodConfig
from megatron_opd.recipe.agents import EnvironmentConfig, SelfTeacherConfig, SkillsConfig
from megatron_opd.recipe.data import DataConfig
from megatron_opd.recipe.rewards import RewardConfig

# ------------------------------------------------------------------------------- models and layouts


@dataclass(frozen=True)
class TeacherConfig(ModelConfig):
    """The teacher's model, and its place."""

    # the last N of the run hold the teacher alone; null: all hold both models
    processes: PositiveInt | None = None
    # its weights lie in host memory while it does not score: device memory for the student
    offload: bool = False


# ----------------------------------------------------------------------------------------- stations
@dataclass(frozen=True)
class RolloutConfig:
    """The samples of every step, and their engine."""

    # what samples: vllm, or "module:Class" of yours, called with the recipe (contracts/stations.py)
    engine: str = "vllm"
    num_prompts: PositiveInt = 64  # prompts per step
    samples_per_prompt: PositiveInt = 8  # the group size
    max_completion_tokens: PositiveInt = 1024  # of one completion; a longer one is cut there
    temperature: Temperature = 1.0  # of the samples that are trained on
    # words that end a completion where they are written; their tokens are a part of it
    stop: list[str] = field(default_factory=list)
    kv_cache_gib: Gibibytes = 1.0  # CPU: key-value cache per engine
    gpu_memory_utilization: Fraction = 0.4  # CUDA: the engine's share of the device
    # N of the run hold an engine alone; null: the student's hold one each
    processes: PositiveInt | None = None


@dataclass(frozen=True)
class OptimizerConfig:
    """Megatron's Adam."""

    lr: PositiveFloat  # learning rate after the warm-up
    # of linear and cosine: what the update after the last one would have
    min_lr: NonNegativeFloat = 0.0
    # of the learning rate, from lr to min_lr over the run
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: NonNegativeInt = 0  # updates u = 1 .. N have u/N of lr
    weight_decay: NonNegativeFloat = 0.0  # decoupled from the gradient (AdamW)
    adam_beta1: Fraction = 0.9  # decay of the mean of gradients
    adam_beta2: Fraction = 0.999  # decay of the mean of squared gradients
    adam_eps: PositiveFloat = 1e-8  # added to the root of the mean of squares
    clip_grad: NonNegativeFloat = 1.0  # global norm; 0 does not clip


@dataclass(frozen=True)
class LossScaleConfig:
    """Megatron's dynamic factor of a float16 loss, so that small gradients are not 0."""

    initial: PositiveFloat = 65536.0  # the factor that a run begins with
    minimum: PositiveFloat = 1.0  # the factor never falls below this
    window: PositiveInt = 1000  # updates without an overflow before the scale doubles
    # overflows before it halves, at every one from then on until it has doubled again
    hysteresis: PositiveInt = 2


@dataclass(frozen=True)
class TrainConfig:
    """The updates: how they share a step's rows, and the optimizer."""

    optimizer: OptimizerConfig
    # of one forward pass on one rank: sequences lie end to end, unpadded
    micro_batch_tokens: PositiveInt = 16384
    updates_per_step: PositiveInt = 1  # optimizer updates on one step's rollouts
    # logits for some tokens at a time: less memory, one more product with the layer
    fused_output_layer: bool = False
    # in the backward pass: MLPs, or whole layers
    recompute_granularity: Literal["none", "selective", "full"] = "none"
    max_skipped_updates: NonNegativeInt = 3  # consecutive non-finite updates before the run stops
    # of float16; without effect at another precision
    loss_scale: LossScaleConfig = LossScaleConfig()


@dataclass(frozen=True)
class SuiteConfig:
    """A benchmark suite that is asked during a run: `megatron-opd bench list`."""

    every: NonNegativeInt = 0  # steps; 0: only before the first and after the last step
    samples: PositiveInt | None = None  # of every question; null: as many as the protocol says
    max_tokens: PositiveInt | None = None  # of a completion; null: as the protocol says
    protocol: Literal["official", "luffy", "tropd"] = "official"
    data: str | None = None  # a file or folder with its data; null: from the Hub


@dataclass(frozen=True)
class EvalConfig:
    """Accuracy on the held-out prompts, and on benchmark suites."""

    every: NonNegativeInt = 0  # steps; 0: only before the first and after the last step
    num_prompts: NonNegativeInt = 0  # the first N held-out prompts; 0: all
    samples_per_prompt: PositiveInt = 1  # of every held-out prompt; their mean is its accuracy
    temperature: NonNegativeFloat = 0.0  # 0: greedy
    top_p: Fraction = 1.0  # only the likeliest tokens that together have this probability; 1: all
    # of an environment's tasks: the student reads no skills, or reads them, or is measured twice
    skills: Literal["without", "with", "both"] = "without"
    # by name, or by the path of a YAML file with one of yours; null leaves one of the base out
    suites: dict[str, SuiteConfig | None] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckpointConfig:
    """The checkpoints of a run."""

    every: NonNegativeInt = 50  # steps; 0: only at the end
    keep: PositiveInt = 2  # newest N checkpoints


@dataclass(frozen=True)
class LogConfig:
    """The files that a run writes beside its metrics."""

    rollouts_per_step: NonNegativeInt = 16  # sampled texts written to rollouts/ each step
    tensorboard: bool = True  # the metrics as TensorBoard's event files, too


# ------------------------------------------------------------------------------------------ the run
@dataclass(frozen=True)
class RunConfig:
    """One recipe."""

    name: str  # of the run: its directory, its logs and its job are named after it
    num_steps: PositiveInt  # rounds of sampling, scoring and updating
    max_sequence_length: PositiveInt  # prompt + completion, tokens
    student: ModelConfig  # the model that is trained
    method: MethodConfig  # a name from docs/methods.md, or terms of your own
    train: TrainConfig  # updates and optimizer
    data: DataConfig = DataConfig()  # what an environment's prompts take from it is the template
    # the model that scores; null where the method asks no teacher
    teacher: TeacherConfig | None = None
    environment: EnvironmentConfig | None = None  # tasks of many turns; null: the rows of data
    # texts that a teacher, or the student, reads beside a prompt; null: none
    skills: SkillsConfig | None = None
    # the student with skills is the teacher; null: it is not
    self_teacher: SelfTeacherConfig | None = None
    rollout: RolloutConfig = RolloutConfig()  # how samples are drawn
    reward: RewardConfig = RewardConfig()  # how samples are graded
    eval: EvalConfig | None = None  # what is measured beside training; null: nothing
    checkpoint: CheckpointConfig = CheckpointConfig()  # how often a run can be resumed from
    log: LogConfig = LogConfig()  # what is written beside the metrics
    # of the models' passes; the optimizer's copy of the weights is float32
    precision: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    seed: Seed = 0  # of everything that is drawn; the same seed and layout give the same run
    run_dir: str = field(default="")  # "": runs/<name>

    @property
    def directory(self) -> str:
        """The run directory."""
        return self.run_dir or f"runs/{self.name}"

    @property
    def models(self) -> dict[str, ModelConfig]:
        """The recipe's models by role: "student" and, if there is one, "teacher"."""
        return {"student": self.student} | ({"teacher": self.teacher} if self.teacher else {})

    def evaluation_of(self, name: str) -> EvalConfig:
        """How a held-out set is asked: as `eval` says, but for what the set says itself."""
        settings = self.eval or EvalConfig()
        one = self.data.sets.get(name)
        if one is None:
            return settings
        samples = one.samples_per_prompt or settings.samples_per_prompt
        temperature = settings.temperature if one.temperature is None else one.temperature
        count = settings.num_prompts if one.num_prompts is None else one.num_prompts
        return replace(
            settings, samples_per_prompt=samples, temperature=temperature, num_prompts=count
        )

    @property
    def teacher_processes(self) -> int:
        """The number of processes set aside for the teacher; 0 if it shares the student's."""
        return (self.teacher.processes or 0) if self.teacher else 0

    @property
    def processes_apart(self) -> dict[str, int]:
        """The number of processes set aside for each role, in their order after the student's."""
        sizes = {"rollout": self.rollout.processes or 0, "teacher": self.teacher_processes}
        return {role: size for role, size in sizes.items() if size}
