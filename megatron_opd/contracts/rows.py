"""What travels between the stations: prompts, rollouts, signals. NumPy only, no torch.

A *completion token* is a token the student sampled (or, for supervised data, a token of the trace).
Every per-token array below covers completion tokens only, in order.
"""

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Prompt:
    """One row of the data set, rendered and tokenised."""

    index: int  # row number in the data file, the prompt's identity in logs and seeds
    problem: str  # as in the data file
    answer: str  # gold answer, as in the data file
    text: str  # after the template
    token_ids: np.ndarray  # int32 [prompt tokens]
    trace: str | None = None  # a worked response, for supervised methods
    trace_ids: np.ndarray | None = None  # int32, the last one is an end
    # number of its first sample: a prompt that a step draws again gets further samples
    first_sample: int = 0


@dataclass(frozen=True)
class Verdict:
    """What a verifier says of the answer in a completion."""

    score: float  # from 0, wrong, to 1, right
    correct: bool | None  # None: nobody judged it, or it cannot be judged
    reason: str  # "correct", "wrong", "no_answer", "timeout", ...


UNSCORED = Verdict(0.0, None, "unscored")
# Reasons that are the verifier's fault or the data's, whatever the answer.
VERIFIER_FAILURES = ("bad_gold", "crashed", "error")


@dataclass(frozen=True)
class Rollout:
    """One completion of one prompt."""

    prompt: Prompt
    sample: int  # prompt.first_sample .. + samples_per_prompt-1
    token_ids: np.ndarray  # int32 [T], the end included when it was sampled
    # float32 [T], the engine's own, of the distribution it sampled from; 0 where given
    logprobs: np.ndarray
    text: str  # decoded completion without special tokens
    finish_reason: str  # "stop" (the last token is an end) | "length"
    policy_version: int  # version of the weights that sampled it; -1 for a trace
    # position of its prompt in the step; rollouts of one group share their reward statistics
    group: int = 0
    reward: float = 0.0  # what the verdict is worth in training
    verdict: Verdict = UNSCORED
    # bool [T], tokens that the teacher drew in the student's place; logprob 0
    by_teacher: np.ndarray | None = None
    # leading tokens that the student did not sample: all of a trace, those of a prefix
    given: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @classmethod
    def of_trace(cls, prompt: Prompt, group: int, sample: int = 0) -> "Rollout":
        """The data set's response to a prompt, as if it had been sampled."""
        assert prompt.trace_ids is not None and prompt.trace is not None
        return cls(
            prompt=prompt,
            sample=sample,
            token_ids=prompt.trace_ids,
            logprobs=np.zeros(len(prompt.trace_ids), np.float32),
            text=prompt.trace,
            finish_reason="stop",
            policy_version=-1,
            group=group,
            verdict=Verdict(0.0, None, "trace"),
            given=len(prompt.trace_ids),
        )


@dataclass(frozen=True)
class TeacherSignals:
    """The teacher's numbers at the T completion tokens of rollouts, flat in rollout order."""

    argmax_ids_T: np.ndarray  # int32, the teacher's most likely token after the student's prefix
    logprobs_T: np.ndarray  # float32, the teacher's logprob of the student's token
    entropy_T: np.ndarray  # float32, nats
    # int32, the k most likely tokens, best first; None where no term asks
    topk_ids_TK: np.ndarray | None = None
    topk_logprobs_TK: np.ndarray | None = None  # float32, of these, under the whole softmax

    def part(self, tokens: slice) -> "TeacherSignals":
        columns = (self.argmax_ids_T, self.logprobs_T, self.entropy_T)
        topk = (self.topk_ids_TK, self.topk_logprobs_TK)
        return TeacherSignals(
            *(column[tokens] for column in columns),
            *(None if column is None else column[tokens] for column in topk),
        )


@dataclass(frozen=True)
class StudentSignals:
    """The student's own view of the completion tokens, before the first update of the step."""

    logprobs_T: np.ndarray  # float32
    entropy_T: np.ndarray  # float32, nats

    def part(self, tokens: slice) -> "StudentSignals":
        return StudentSignals(self.logprobs_T[tokens], self.entropy_T[tokens])


@dataclass(frozen=True)
class Signals:
    """All models' signals of the completion tokens of rollouts; None where no term reads one."""

    teacher: TeacherSignals | None = None
    reference_logprobs_T: np.ndarray | None = None  # float32, of the student as the run found it
    student: StudentSignals | None = None
    process_logprobs_T: np.ndarray | None = None  # float32, of the process model before its update

    def part(self, tokens: slice) -> "Signals":
        """The rows of some tokens."""
        reference = self.reference_logprobs_T
        process = self.process_logprobs_T
        return Signals(
            self.teacher and self.teacher.part(tokens),
            None if reference is None else reference[tokens],
            self.student and self.student.part(tokens),
            None if process is None else process[tokens],
        )


@dataclass
class StepRecord:
    """Everything the sinks need of one step."""

    step: int
    metrics: dict[str, float] = field(default_factory=dict)
    rollouts: list[Rollout] = field(default_factory=list)
    teacher: TeacherSignals | None = None
