"""The models' signals of completion tokens, one number per token. NumPy only, no torch.

Suffixes: T completion tokens, flat in the order of the rows; K ids a token.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TeacherSignals:
    """The teacher's numbers at the T completion tokens of rows, flat in the order of the rows."""

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
    """All models' signals of the completion tokens of rows; None where no term reads one."""

    teacher: TeacherSignals | None = None
    reference_logprobs_T: np.ndarray | None = None  # float32, of the student as the run found it
    student: StudentSignals | None = None
    process_logprobs_T: np.ndarray | None = None  # float32, of the process model before its update

    def part(self, tokens: slice) -> "Signals":
        """The signals of some tokens."""
        reference = self.reference_logprobs_T
        process = self.process_logprobs_T
        return Signals(
            self.teacher and self.teacher.part(tokens),
            None if reference is None else reference[tokens],
            self.student and self.student.part(tokens),
            None if process is None else process[tokens],
        )
