"""The subject of a plan: a recipe's sizes on a cluster, with one layout for each model."""

from dataclasses import dataclass, replace
from functools import cached_property

from megatron_opd.architectures.architecture import Architecture
from megatron_opd.architectures.config import LayoutConfig, ModelConfig
from megatron_opd.checks.method import check_method
from megatron_opd.checks.processes import sequences_per_step
from megatron_opd.checks.sizes import check_sizes
from megatron_opd.mcore.model import DTYPES
from megatron_opd.methods.needs import needs_of
from megatron_opd.methods.part import Needs
from megatron_opd.planning.activations import FullMicroBatch
from megatron_opd.planning.hardware import Hardware
from megatron_opd.recipe.keys import RunConfig


@dataclass(frozen=True)
class Case:
    """A recipe on a cluster.

    Memory and times are those of full micro-batches, with sequences as long as the recipe allows.
    """

    config: RunConfig
    architectures: dict[str, Architecture]  # of "student", and of "teacher" if it is another model
    hardware: Hardware
    gpus: int
    gpus_per_node: int

    def check(self) -> None:
        """Makes the recipe's checks that need no model directory. Raises ConfigError."""
        check_method(self.config)
        check_sizes(self.config, self.architectures, world_size=self.gpus)

    def with_layouts(self, student: LayoutConfig, teacher: LayoutConfig | None) -> "Case":
        """The case with other layouts; None keeps the teacher's."""
        config = replace(self.config, student=replace(self.config.student, layout=student))
        if config.teacher and teacher:
            config = replace(config, teacher=replace(config.teacher, layout=teacher))
        return replace(self, config=config)

    @cached_property
    def needs(self) -> Needs:
        """The models and signals that the method needs in some step."""
        return needs_of(self.config.method, self.config.train.updates_per_step)

    @property
    def reads_teacher(self) -> bool:
        """True when the run has a teacher: a model of its own, or the student itself."""
        there = self.config.teacher is not None or self.config.self_teacher is not None
        return there and (self.needs.teacher or self.needs.teacher_head)

    @property
    def offloads_teacher(self) -> bool:
        """True when the teacher leaves the device between its phases, which the host has not."""
        teacher = self.config.teacher
        offloaded = teacher is not None and teacher.offload
        return self.reads_teacher and offloaded and self.hardware.is_cuda

    @property
    def engine_sleeps(self) -> bool:
        """True when the engine leaves the device to the student between its phases.

        It stays on the host, and on processes of its own.
        """
        return self.hardware.is_cuda and "rollout" not in self.config.processes_apart

    @property
    def generates(self) -> bool:
        """True when the run has an engine."""
        return self.needs.rollouts or self.config.eval is not None

    @property
    def element(self) -> int:
        """Bytes of a parameter or activation."""
        return DTYPES[self.config.precision].itemsize

    def model(self, name: str) -> ModelConfig:
        """The recipe's section "student" or "teacher"; a self-teacher is as the student is."""
        itself = name == "student" or self.config.self_teacher is not None
        model = self.config.student if itself else self.config.teacher
        assert model is not None, "asked for a teacher that the recipe does not have"
        return model

    def architecture(self, name: str) -> Architecture:
        """The architecture of "student" or "teacher"."""
        return self.architectures["student" if self.config.self_teacher else name]

    def longest(self, name: str) -> int:
        """The most tokens of a row that a model reads, the teacher's privileged text included."""
        skills = self.config.skills
        privileged = name == "teacher" and skills is not None and skills.reader == "teacher"
        return self.config.max_sequence_length + (skills.max_tokens if skills and privileged else 0)

    # ----------------------------------------------------------------------------- division of work
    @property
    def roles(self) -> list[str]:
        """The roles of the run's processes: some of "student", "rollout", "teacher"."""
        return ["student"] + ["rollout"] * self.generates + ["teacher"] * self.reads_teacher

    def ranks_of(self, role: str) -> range:
        """The ranks of a role: its own processes, or else the student's.

        A role's own processes are the last ones, in the order of `processes_apart`.
        """
        first = self.gpus
        for apart, size in reversed(self.config.processes_apart.items()):
            first -= size
            if apart == role:
                return range(first, first + size)
        return range(first)

    def gpus_of(self, role: str) -> int:
        """The number of a role's ranks."""
        return len(self.ranks_of(role))

    def stage_size(self, role: str) -> int:
        """The number of ranks of a stage, which Megatron numbers in a row; an engine is one."""
        stages = 1 if role == "rollout" else self.model(role).layout.pipeline_model_parallel_size
        return self.gpus_of(role) // stages

    def replicas(self, name: str) -> int:
        """The number of copies of a model."""
        return self.gpus_of(name) // self.model(name).layout.model_parallel_size

    @cached_property
    def samples(self) -> int:
        """The most sequences of a step: an episode of several turns may have a row for each."""
        return sequences_per_step(self.config) * self.rows_per_episode

    @property
    def rows_per_episode(self) -> int:
        """The most rows of an episode."""
        environment = self.config.environment
        return environment.max_turns if environment and environment.history.kind == "window" else 1

    @property
    def sampled(self) -> int:
        """The most tokens that are sampled for a row: in a growing conversation, of all turns."""
        environment = self.config.environment
        completion = self.config.rollout.max_completion_tokens
        if environment is None or environment.history.kind == "window":
            return completion
        return environment.max_episode_tokens or environment.max_turns * completion

    def micro_batches(self, name: str, samples: int) -> int:
        """The number of micro-batches of one replica, for this many sequences."""
        ranks = self.model(name).layout.context_parallel_size
        capacity = self.config.train.micro_batch_tokens * ranks
        return -(-samples // (self.replicas(name) * (capacity // self.longest(name))))

    @property
    def samples_per_update(self) -> int:
        """The number of sequences of an update."""
        return self.samples // self.config.train.updates_per_step

    @property
    def predicted(self) -> int:
        """The number of tokens of a sequence that have logits."""
        longest = self.config.max_sequence_length
        environment = self.config.environment
        grows = environment is not None and environment.history.kind == "growing"
        only_samples = self.needs.rollouts and not self.needs.traces and not grows
        return min(longest, self.config.rollout.max_completion_tokens) if only_samples else longest

    def signals(self, topk: int) -> int:
        """The count of numbers in a frozen model's signals of a step's tokens."""
        return self.samples * self.predicted * (3 + 2 * topk)

    def micro_batch(self, name: str) -> FullMicroBatch:
        """A full micro-batch of a model: as many tokens as are allowed, or as a replica gets."""
        samples = self.samples_per_update if name == "student" else self.samples
        ranks = self.model(name).layout.context_parallel_size
        longest = self.longest(name)
        share = -(-samples // self.replicas(name)) * -(-longest // ranks)
        tokens = min(self.config.train.micro_batch_tokens, share)
        return FullMicroBatch(
            arch=self.architecture(name),
            layout=self.model(name).layout,
            element=self.element,
            is_cuda=self.hardware.is_cuda,
            tokens=tokens,
            predicted=tokens * self.predicted // longest,
        )
