"""The keys of agents: environments of many turns, skills, and the student as its own teacher."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_opd.contracts.ranges import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ProperFraction,
    Seconds,
)


@dataclass(frozen=True)
class HistoryConfig:
    """What the model reads of the turns before."""

    # window: every turn is a row of its own, with the last exchanges in its prompt; growing: an
    # episode is one row, to which answers and observations are appended
    kind: Literal["window", "growing"] = "window"
    length: NonNegativeInt = 2  # window: the exchanges in a prompt
    # growing: an observation is a message of the chat template, or bare text behind the model's own
    observations: Literal["message", "text"] = "message"


@dataclass(frozen=True)
class EnvironmentConfig:
    """Tasks of many turns in place of data: an environment that answers the model's actions."""

    # workshop | alfworld | webshop | search_qa, "module:Class" of yours, or a gymnasium id such as
    # "package:Name-v0"
    kind: str
    # handed to the environment by name when it is made
    options: dict[str, str | int | float | bool] = field(default_factory=dict)
    # tasks: a split that the environment names, a number N for the tasks "0" to "N-1", or a file
    # with a task id per line
    train: str | PositiveInt = "train"
    heldout: str | PositiveInt = "heldout"  # as train, for eval
    # "module:Class" of yours that writes prompts and reads actions; null: the environment's own
    dialogue: str | None = None
    history: HistoryConfig = HistoryConfig()  # what of the turns before the model reads
    # an episode that has not ended by then is cut, and counts as it stands
    max_turns: PositiveInt = 10
    # sampled tokens of an episode; null: max_turns times rollout.max_completion_tokens
    max_episode_tokens: PositiveInt | None = None
    # what an episode earns: reward_scale when it is won, times its score, or times the sum of
    # the environment's rewards
    reward: Literal["won", "score", "return"] = "won"
    reward_scale: PositiveFloat = 1.0  # the factor of what an episode earns
    invalid_penalty: NonNegativeFloat = 0.0  # of a row, for a turn without a valid action
    workers: PositiveInt = 1  # processes that play, per training process
    # parts of a step's episodes that are sampled by turns: an engine works while environments do;
    # 0: those that have been answered are sampled, faster, in batches that no run repeats
    cohorts: NonNegativeInt = 1
    # their Python, for packages that clash with these; null: the one that trains
    python: str | None = None
    reset_seconds: Seconds = 120.0  # of one reset, before the process is replaced
    step_seconds: Seconds = 30.0  # of one action

    @property
    def grows(self) -> bool:
        """True when an episode is one row."""
        return self.history.kind == "growing"


@dataclass(frozen=True)
class SkillsConfig:
    """Privileged texts: a teacher, or the student itself, reads one with every prompt."""

    # a .json bank, or a directory with skill_mapping.json and its files
    bank: str
    # keyword, substring: by the task's words; ucb: what has helped so far; full: the whole bank;
    # random: those of a wrong category, as a control
    retrieval: Literal["keyword", "substring", "ucb", "full", "random"] = "keyword"
    exploration: NonNegativeFloat = 1.0  # ucb: the weight of what was tried seldom
    reader: Literal["teacher", "student"] = "teacher"  # student: as it samples, and is trained
    # in the system message, ahead of the user's message, or ahead of the whole prompt and outside
    # of any message
    place: Literal["system", "user", "raw_prefix"] = "system"
    max_tokens: PositiveInt = 1536  # that a text may add to a prompt; a longer one is an error


@dataclass(frozen=True)
class SelfTeacherConfig:
    """The student as the teacher, of rows that the skills are added to."""

    # the student's present weights, those it began with, those of every so many steps, or their
    # moving average
    weights: Literal["present", "first", "every", "average"] = "present"
    every: PositiveInt = 10  # every: steps between copies
    decay: ProperFraction = 0.99  # average: what a step keeps of it
