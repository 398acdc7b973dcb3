"""Losses against several of the teacher's tokens at once, differentiated through the student's
log-probabilities."""

import torch
from torch import Tensor

from megatron_opd.methods.terms import TopKTerm
from megatron_opd.vocab_parallel import truncated_forward_kl


def on_topk(
    term: TopKTerm, student_TK: Tensor, teacher_TK: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss per token on the term's k ids, and per-token numbers for the metrics (detached)."""
    student_TK, teacher_TK = student_TK[:, : term.k], teacher_TK[:, : term.k]
    if term.divergence == "jsd_teacher_side":
        assert term.beta is not None, "checked before the run"
        value_T = jsd_teacher_side(student_TK, teacher_TK, term.beta)
        facts = {"teacher_mass": teacher_TK.exp().sum(dim=1)}
    else:
        kl = truncated_forward_kl(student_TK, teacher_TK, tail=term.tail)
        value_T, facts = (
            kl.loss_T,
            {"teacher_mass": kl.teacher_mass_T, "student_mass": kl.student_mass_T},
        )
    return value_T / term.k if term.divide_by_k else value_T, facts


def jsd_teacher_side(student_TK: Tensor, teacher_TK: Tensor, beta: float) -> Tensor:
    """beta sum_k q_k (log q_k - log m_k), m = beta q + (1 - beta) p; float32 [T].

    The first half of the JSD row of TrOPD as printed. Its exact gradient is
    `LogRatioAdvantage(transform="mixture")`.
    """
    teacher_TK = teacher_TK.detach()
    q_TK = teacher_TK.exp()
    m_TK = beta * q_TK + (1 - beta) * student_TK.exp()
    return beta * torch.special.xlogy(q_TK, q_TK / m_TK).sum(dim=1)
