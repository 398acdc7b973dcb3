"""The records that travel between stations: tasks, episodes, rows. NumPy only, no torch.

Suffixes: T completion tokens, flat in the order of the rows; C prompt tokens. A *completion token*
is one behind the prompt, whoever wrote it; every per-token array covers completion tokens only.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Literal

import numpy as np

from megatron_opd.contracts.environments import Exchange
from megatron_opd.contracts.signals import TeacherSignals


class Source(IntEnum):
    """The writer of a token; int8 in arrays."""

    STUDENT = 0
    TEACHER = 1  # drawn by the teacher in the student's place
    TRACE = 2  # from the data: all of a trace, or a prefix
    ENVIRONMENT = 3  # what an environment answered


@dataclass(frozen=True)
class Task:
    """Something to be solved: a row of the data set, rendered and tokenised, or a task of an
    environment, whose `problem` is its id."""

    index: int  # its identity in seeds and logs: the row number in the data files
    problem: str  # as in the data file
    answer: str  # gold answer, as in the data file
    text: str  # after the template
    prompt_ids: np.ndarray  # int32 [C]; empty where an environment writes the prompt
    trace: str | None = None  # a worked completion, for supervised methods
    trace_ids: np.ndarray | None = None  # int32, the last one is an end
    source: str = ""  # where its row of the data is from
    # of its row of the data, by name, where a reward reads them; left out of rows that are gathered
    columns: Mapping[str, object] = field(default_factory=dict)
    # number of its first sample: a task that a step draws again gets further samples
    first_sample: int = 0
    level: float = 0.0  # its place in a curriculum: lower ones are drawn first


@dataclass(frozen=True)
class Verdict:
    """A verifier's or an environment's finding about an answer."""

    # from 0, wrong, to 1, right; that of a user's function may be any finite number
    score: float
    correct: bool | None  # None: nobody judged it, or it cannot be judged
    reason: str  # "correct", "wrong", "no_answer", "timeout", ...
    extracted: str = ""  # the answer that was read from the completion, where there is one
    parts: tuple[tuple[str, float], ...] = ()  # further scores by name, from 0 to 1


UNSCORED = Verdict(0.0, None, "unscored")
# Reasons that are the verifier's fault or the data's, whatever the answer.
VERIFIER_FAILURES = ("bad_gold", "crashed", "error")
# Reasons of verdicts that do not tell right from wrong.
NOT_JUDGED = (*VERIFIER_FAILURES, "over_budget")


@dataclass(frozen=True)
class Episode:
    """One attempt at one task, the same in all rows that it has."""

    task: Task
    sample: int  # task.first_sample .. + samples_per_prompt - 1; traces stand behind them
    # position of its task in the step; the episodes of one group share their reward statistics
    group: int = 0
    verdict: Verdict = UNSCORED
    reward: float = 0.0  # what the verdict is worth in training
    turns: int = 1  # completions of the model in it
    # failed: its environment broke; it is left out of every statistic, and counted
    ended: Literal["stop", "length", "turns", "budget", "failed"] = "stop"
    task_type: str = ""  # the kind of task, as its environment says
    skill: str = ""  # the name of the privileged text that was retrieved for it
    # of the recipe's rewards and the length penalty, by name, where the reward is a sum of them
    verdicts: tuple[tuple[str, Verdict], ...] = ()

    @property
    def key(self) -> tuple[int, int, int]:
        """Names an episode within a step, also where rows were gathered and their episodes are
        equal copies."""
        return self.group, self.task.index, self.sample


@dataclass(frozen=True)
class Row:
    """One sequence that is scored and trained on."""

    episode: Episode
    prompt_ids: np.ndarray  # int32 [C], what the completion continues
    token_ids: np.ndarray  # int32 [T], the end included when it was sampled
    sources: np.ndarray  # int8 [T], of Source
    # float32 [T], the sampler's, of the distribution it drew from; 0 where it is not the student's
    logprobs: np.ndarray
    # int32 [T], the policy in force when a token was drawn; -1 where nobody drew it
    versions: np.ndarray
    text: str  # decoded completion without special tokens
    finish_reason: str  # of its last turn: "stop" (the last token is an end) | "length"
    turn: int = 0  # of the first token; an environment's answer within the row opens the next one
    cut_turns: tuple[int, ...] = ()  # turns before the last that ended at the limit of tokens
    penalty: float = 0.0  # what this row alone loses of the reward, for an invalid action
    # int32, the prompt with the privileged text that the student did not read
    privileged_ids: np.ndarray | None = None
    exchanges: tuple[Exchange, ...] = ()  # with the environment, one of each of its turns
    action_T: np.ndarray | None = None  # bool [T], of the words that the environment was told

    @property
    def task(self) -> Task:
        return self.episode.task

    @property
    def group(self) -> int:
        return self.episode.group

    @property
    def sample(self) -> int:
        return self.episode.sample

    @property
    def verdict(self) -> Verdict:
        return self.episode.verdict

    @property
    def reward(self) -> float:
        return self.episode.reward - self.penalty

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def written_T(self) -> np.ndarray:
        """Bool [T], by anyone but an environment."""
        return self.sources != Source.ENVIRONMENT

    @property
    def num_written(self) -> int:
        return int(self.written_T.sum())

    @property
    def turn_T(self) -> np.ndarray:
        """The turn a token belongs to, int64 [T]; an environment's answer is of the turn before."""
        opens_T = np.zeros(self.num_tokens, np.int64)
        opens_T[1:] = ~self.written_T[:-1] & self.written_T[1:]
        return self.turn + opens_T.cumsum()

    @property
    def finished_T(self) -> np.ndarray:
        """Bool [T], of a turn that ended by itself."""
        turn_T = self.turn_T
        cut = [*self.cut_turns, *(turn_T[-1:] if self.finish_reason == "length" else [])]
        return ~np.isin(turn_T, cut)

    @property
    def end_T(self) -> np.ndarray:
        """Bool [T], the end of a turn that ended by itself."""
        last_T = self.written_T
        last_T[:-1] &= ~self.written_T[1:]
        if self.num_tokens:
            last_T[-1] = self.written_T[-1]
        return last_T & self.finished_T

    @property
    def truncated(self) -> bool:
        """True when the limit of tokens cut one of the row's turns."""
        return self.finish_reason == "length" or bool(self.cut_turns)

    @property
    def num_given(self) -> int:
        """The number of first tokens that are the data's: all of a trace, those of a prefix."""
        return int((self.sources == Source.TRACE).cumprod().sum())

    @property
    def version(self) -> int:
        """The policy in force when its last tokens were drawn; -1 where none was drawn."""
        return int(self.versions.max(initial=-1))

    @classmethod
    def of_student(
        cls,
        episode: Episode,
        token_ids: np.ndarray,
        logprobs: np.ndarray,
        *,
        version: int,
        text: str = "",
        finish_reason: str = "stop",
    ) -> "Row":
        """A completion of the task's prompt that the student sampled with the weights of
        `version`."""
        sources = np.full(len(token_ids), Source.STUDENT, np.int8)
        versions = np.full(len(token_ids), version, np.int32)
        return cls(
            episode, episode.task.prompt_ids, token_ids, sources, logprobs, versions, text,
            finish_reason,
        )  # fmt: skip

    @classmethod
    def of_trace(cls, task: Task, group: int, sample: int = 0) -> "Row":
        """The data set's completion of a task."""
        assert task.trace_ids is not None and task.trace is not None
        tokens = len(task.trace_ids)
        return cls(
            episode=Episode(task, sample, group, Verdict(0.0, None, "trace")),
            prompt_ids=task.prompt_ids,
            token_ids=task.trace_ids,
            sources=np.full(tokens, Source.TRACE, np.int8),
            logprobs=np.zeros(tokens, np.float32),
            versions=np.full(tokens, -1, np.int32),
            text=task.trace,
            finish_reason="stop",
        )

    def as_if_sampled(self) -> "Row":
        """The row with every token the student's, for an off-policy step. Nobody drew them: they
        keep the version -1."""
        return replace(self, sources=np.full(self.num_tokens, Source.STUDENT, np.int8))


def episodes_of(rows: Iterable[Row]) -> list[Episode]:
    """The episodes of rows, every one once, in the order of their first rows."""
    return list({row.episode.key: row.episode for row in rows}.values())


def with_episodes(rows: Sequence[Row], change: Callable[[Episode], Episode]) -> list[Row]:
    """The rows with changed episodes; `change` is asked once for every episode."""
    episodes = {row.episode.key: row.episode for row in rows}
    changed = {key: change(episode) for key, episode in episodes.items()}
    return [replace(row, episode=changed[row.episode.key]) for row in rows]


def without_columns(rows: Iterable[Row]) -> list[Row]:
    """The rows without their tasks' columns, which only a verifier reads and which can be large."""
    return [
        replace(row, episode=replace(row.episode, task=replace(row.task, columns={})))
        if row.task.columns
        else row
        for row in rows
    ]


@dataclass
class StepRecord:
    """Everything the sinks need of one step."""

    step: int
    metrics: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    teacher: TeacherSignals | None = None
