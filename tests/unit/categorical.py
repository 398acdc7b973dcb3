"""One state, seven tokens: a student, a teacher and a reference whose expected gradients can be
enumerated."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_opd.contracts.signals import Signals, StudentSignals, TeacherSignals
from megatron_opd.methods.method import MethodConfig
from megatron_opd.methods.needs import fit_topk
from megatron_opd.objective.batch import Batch
from megatron_opd.objective.columns import build_columns
from megatron_opd.objective.loss import Objective
from megatron_opd.vocab_parallel import divergence, logprobs
from tests.rows import row, task

V, K = 7, 3
_random = np.random.default_rng(0)
STUDENT_LOGITS = torch.from_numpy(_random.normal(size=V)).float()
_normal = lambda scale: torch.from_numpy(_random.normal(size=V) * scale).float()  # noqa: E731
TEACHER, REFERENCE, PROCESS = (_normal(scale).log_softmax(0) for scale in (1.5, 1.0, 1.0))
REWARDS = torch.tensor([1.0, 0, 0, 1, 0, 1, 0])


@dataclass
class OnLogits:
    """A head whose logits are given."""

    logits_TV: torch.Tensor

    def logprobs(self, ids_TK, **settings):
        return logprobs(self.logits_TV, ids_TK, None, **settings)

    def logprobs_and_entropy(self, ids_TK, **settings):
        return logprobs(self.logits_TV, ids_TK, None, with_entropy=True, **settings)

    def divergence(self, teacher, **settings):
        return divergence(self.logits_TV, teacher.logits_TV, None, **settings)


def small(method: MethodConfig) -> MethodConfig:
    """The method with the teacher's top 3 in the place of its top 64."""
    return fit_topk(method, K)


def every_token(step: int = 0, rewards: torch.Tensor = REWARDS) -> Batch:
    """One group of V rollouts: number v sampled token v and nothing else."""
    student = STUDENT_LOGITS.log_softmax(0)
    rows = [
        row(
            [v],
            of=task(),
            sample=v,
            logprobs=student[v : v + 1].numpy(),
            finish_reason="length",
            reward=float(rewards[v]),
        )
        for v in range(V)
    ]
    best = TEACHER.topk(K)
    repeat = lambda of_V: np.tile(of_V.numpy(), (V, 1))  # noqa: E731
    entropy = lambda log_p: np.full(V, float(-(log_p.exp() * log_p).sum()), np.float32)  # noqa: E731
    teacher = TeacherSignals(
        np.full(V, int(TEACHER.argmax()), np.int32), TEACHER.numpy(), entropy(TEACHER),
        repeat(best.indices).astype(np.int32), repeat(best.values),
    )  # fmt: skip
    return Batch(
        rows,
        Signals(
            teacher,
            REFERENCE.numpy(),
            StudentSignals(student.numpy(), entropy(student)),
            PROCESS.numpy(),
        ),
        0,
        step,
        V,
    )


def expected_gradient(
    method: MethodConfig, step: int = 0, rewards: torch.Tensor = REWARDS
) -> torch.Tensor:
    """Of the loss by the student's logits, the expectation over the token the student samples;
    float64 [V]."""
    batch = every_token(step, rewards)
    columns = build_columns(small(method), batch)
    logits_TV = STUDENT_LOGITS.repeat(V, 1).requires_grad_()
    # The batch counts every token once; the student, or its mixture with the teacher, samples them.
    sampler_V = STUDENT_LOGITS.softmax(0)
    if method.teacher_share:
        sampler_V = (1 - method.teacher_share) * sampler_V + method.teacher_share * TEACHER.exp()
    frequencies_V = V * sampler_V
    columns = replace(columns, scales_TJ=columns.scales_TJ * frequencies_V[:, None])
    teacher = OnLogits(TEACHER.repeat(V, 1))
    loss, _ = Objective(small(method), V, 1.0)(OnLogits(logits_TV), columns, step, lambda: teacher)
    (gradient,) = torch.autograd.grad(loss, logits_TV)
    return gradient.double().sum(0)
