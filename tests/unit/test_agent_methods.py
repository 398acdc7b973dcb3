"""SDAR's family against the released losses, written out in float64: on rows of several turns, for
the first update of a step and for a later one."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_opd.checks.method import check_method
from megatron_opd.contracts.signals import Signals, StudentSignals, TeacherSignals
from megatron_opd.errors import ConfigError
from megatron_opd.methods.advantages import RewardAdvantage
from megatron_opd.methods.catalogue import CATALOGUE
from megatron_opd.methods.gates import SigmoidGate
from megatron_opd.methods.method import MethodConfig
from megatron_opd.methods.terms import PolicyGradientTerm
from megatron_opd.objective.batch import Batch
from megatron_opd.objective.columns import build_columns
from megatron_opd.objective.loss import Objective
from megatron_opd.recipe.load import load_config
from tests.scripted import SEED, rows_of_episodes
from tests.unit.categorical import OnLogits

V = 11
STEP = 20  # counted from 0
ROWS = rows_of_episodes("window", V)
IDS_T = torch.from_numpy(np.concatenate([r.token_ids for r in ROWS])).long()
_draws = torch.Generator().manual_seed(2)


def _logits(scale: float) -> Tensor:
    return scale * torch.randn(len(IDS_T), V, generator=_draws, dtype=torch.float64)


OLD_TV = _logits(1.0)
TEACHER_TV = (OLD_TV + _logits(0.7)).log_softmax(1)
# Of every seventh token the reference is so much surer that k3 is cut off.
_far_TV = torch.nn.functional.one_hot(IDS_T, V) * (torch.arange(len(IDS_T)) % 7 == 0)[:, None]
REFERENCE_TV = (OLD_TV + _logits(0.3) + 9 * _far_TV).log_softmax(1)
# The student at the first update of a step, and at a later one.
STUDENTS = {"first": OLD_TV, "later": OLD_TV + _logits(0.3)}


def of_ids(log_p_TV: Tensor) -> Tensor:
    return log_p_TV.gather(1, IDS_T[:, None])[:, 0]


def entropy(log_p_TV: Tensor) -> Tensor:
    return -(log_p_TV.exp() * log_p_TV).sum(1)


OLD_T, TEACHER_T, REFERENCE_T = (
    of_ids(x) for x in (OLD_TV.log_softmax(1), TEACHER_TV, REFERENCE_TV)
)


# ------------------------------------------------------------------------------ the released losses
def advantages_of_rows() -> Tensor:
    """GRPO's, over the rows of a group; each row with its own penalty."""
    rewards = torch.tensor([r.reward for r in ROWS], dtype=torch.float64)
    out = torch.zeros_like(rewards)
    for group in {r.group for r in ROWS}:
        members = torch.tensor([r.group == group for r in ROWS])
        values = rewards[members]
        out[members] = (values - values.mean()) / (values.std() + 1e-6)
    return out.repeat_interleave(torch.tensor([r.num_tokens for r in ROWS]))


def clipped(student_T: Tensor, advantages_T: Tensor) -> Tensor:
    """PPO's loss with clip 0.2 and dual clip 3, as verl writes it."""
    ratio_T = (student_T - OLD_T).exp()
    bounded_T = torch.maximum(-advantages_T * ratio_T, -advantages_T * ratio_T.clamp(0.8, 1.2))
    lowest_T = torch.minimum(-advantages_T * 3.0, bounded_T)
    return torch.where(advantages_T < 0, lowest_T, bounded_T)


def kept_close(student_TV: Tensor) -> Tensor:
    """0.01 k3 to the reference, cut off and differentiated, and the entropy bonus."""
    return 0.01 * k3(student_TV).clamp(-10, 10) - 1e-3 * entropy(student_TV)


def k3(student_TV: Tensor) -> Tensor:
    difference_T = REFERENCE_T - of_ids(student_TV)
    return difference_T.exp() - difference_T - 1


def grpo(student_TV: Tensor) -> Tensor:
    return clipped(of_ids(student_TV), advantages_of_rows()) + kept_close(student_TV)


def sdar_term(student_T: Tensor, gate_T: Tensor) -> Tensor:
    return 0.01 * gate_T.detach() * (TEACHER_T - student_T)


def gap_gate(student_TV: Tensor, beta: float = 5.0) -> Tensor:
    return (beta * (TEACHER_T - of_ids(student_TV))).sigmoid().detach()


def sdar(student_TV: Tensor, beta: float = 5.0) -> Tensor:
    return grpo(student_TV) + sdar_term(of_ids(student_TV), gap_gate(student_TV, beta))


def sdar_entropy(student_TV: Tensor) -> Tensor:
    return grpo(student_TV) + sdar_term(of_ids(student_TV), (5 * entropy(student_TV)).sigmoid())


def sdar_soft_or(student_TV: Tensor) -> Tensor:
    student_T = of_ids(student_TV)
    uncertain_T, endorsed_T = 1 - (-entropy(student_TV)).exp(), (TEACHER_T - student_T).sigmoid()
    either_T = 1 - (1 - uncertain_T) * (1 - endorsed_T)
    return grpo(student_TV) + sdar_term(student_T, (5 * either_T).sigmoid())


def opsd(student_TV: Tensor) -> Tensor:
    return kept_close(student_TV) + sdar_term(of_ids(student_TV), gap_gate(student_TV))


def rlsd(student_TV: Tensor) -> Tensor:
    advantages_T = advantages_of_rows()
    weight_T = (advantages_T.sign() * (TEACHER_T - OLD_T)).exp().clamp(0.8, 1.2)
    coefficient = 0.5 * (1 - (STEP + 1) / 100)  # its steps are counted from 1
    token_T = advantages_T * ((1 - coefficient) + coefficient * weight_T)
    return clipped(of_ids(student_TV), token_T) + kept_close(student_TV)


def skill_sd(student_TV: Tensor, coefficient: float = 1e-3) -> Tensor:
    student_T = of_ids(student_TV)
    distance_T = student_T - TEACHER_T
    k3_T = (-distance_T).clamp(max=20).exp() - 1 + distance_T
    ratio_T = (student_T - OLD_T).clamp(max=10).exp()
    return grpo(student_TV) + coefficient * ratio_T * k3_T


def divergent(student_TV: Tensor, kind: str) -> Tensor:
    """The variants of the ablation: a divergence of whole distributions behind the gate."""
    teacher_TV, own_TV = TEACHER_TV, student_TV
    if kind == "forward_kl":
        value_T = (teacher_TV.exp() * (teacher_TV - own_TV)).sum(1)
    else:
        middle_TV = (0.5 * teacher_TV.exp() + 0.5 * own_TV.exp()).log()
        value_T = 0.5 * (teacher_TV.exp() * (teacher_TV - middle_TV)).sum(1)
        value_T = value_T + 0.5 * (own_TV.exp() * (own_TV - middle_TV)).sum(1)
    return grpo(student_TV) + 0.01 * gap_gate(student_TV) * value_T


def sdar_rkl(student_TV: Tensor) -> Tensor:
    student_T = of_ids(student_TV)
    worth_T = (TEACHER_T - student_T).detach()
    value_T = -(student_T - OLD_T).exp() * worth_T
    return grpo(student_TV) + 0.01 * gap_gate(student_TV) * value_T


RELEASED: dict[str, Callable[[Tensor], Tensor]] = {
    "grpo_agents": grpo,
    "sdar": sdar,
    "sdar_entropy": sdar_entropy,
    "sdar_soft_or": sdar_soft_or,
    "sdar_fkl": lambda student_TV: divergent(student_TV, "forward_kl"),
    "sdar_jsd": lambda student_TV: divergent(student_TV, "jsd"),
    "sdar_rkl": sdar_rkl,
    "opsd": opsd,
    "grpo_opsd": lambda student_TV: sdar(student_TV, beta=0.0),
    "rlsd": rlsd,
    "skill_sd": skill_sd,
    "skill_sd_warm_down": lambda student_TV: skill_sd(student_TV, 1e-3 * (1 - (STEP + 1) / 100)),
}


# ---------------------------------------------------------------------------------------- the tests
def over_rows(method: MethodConfig) -> MethodConfig:
    """The method with the released code's group statistics."""
    terms = {}
    for name, term in method.terms.items():
        if isinstance(term, PolicyGradientTerm):
            parts = {
                key: replace(part, over="rows") if isinstance(part, RewardAdvantage) else part
                for key, part in term.advantages.items()
            }
            term = replace(term, advantages=parts)
        terms[name] = term
    return replace(method, terms=terms)


def ours(method: MethodConfig, student_TV: Tensor, *, later: bool) -> tuple[dict, Tensor]:
    """The values of the terms, and the gradient of the loss by the logits."""
    numbers = lambda tensor: tensor.float().numpy()  # noqa: E731
    teacher = TeacherSignals(
        TEACHER_TV.argmax(1).int().numpy(), numbers(TEACHER_T), numbers(entropy(TEACHER_TV))
    )
    student = StudentSignals(numbers(OLD_T), numbers(entropy(OLD_TV.log_softmax(1))))
    signals = Signals(teacher, numbers(REFERENCE_T), student if later else None)
    columns = build_columns(method, Batch(ROWS, signals, SEED, STEP, 20))
    logits_TV = student_TV.float().requires_grad_()
    loss, sums = Objective(method, V, 1.0)(
        OnLogits(logits_TV), columns, STEP, lambda: OnLogits(TEACHER_TV.float())
    )
    (gradient,) = torch.autograd.grad(loss, logits_TV)
    return {name: float(value) for name, value in sums.items()}, gradient.double()


@pytest.mark.parametrize("when", STUDENTS)
@pytest.mark.parametrize("name", RELEASED)
def test_gradient_is_that_of_the_released_loss(name: str, when: str) -> None:
    method = over_rows(CATALOGUE[name].method)
    _, got = ours(method, STUDENTS[when], later=when == "later")
    leaf = STUDENTS[when].clone().requires_grad_()
    (want,) = torch.autograd.grad(RELEASED[name](leaf.log_softmax(1)).mean(), leaf)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("when", STUDENTS)
def test_losses_are_the_released_ones(when: str) -> None:
    """Of the terms, but for the reference's, which has the gradient of k3 and not its value."""
    student_TV = STUDENTS[when].log_softmax(1)
    student_T = of_ids(student_TV)
    want = {
        ("sdar", "policy"): clipped(student_T, advantages_of_rows()),
        ("sdar", "entropy"): -entropy(student_TV),
        ("sdar", "sdar"): gap_gate(student_TV) * (TEACHER_T - student_T),
        ("rlsd", "policy"): rlsd(student_TV) - kept_close(student_TV),
        ("skill_sd", "distil"): (skill_sd(student_TV) - grpo(student_TV)) * 1e3,
    }
    for (name, term), loss_T in want.items():
        sums, _ = ours(over_rows(CATALOGUE[name].method), STUDENTS[when], later=when == "later")
        got = sums[f"objective/{term}/loss"]
        assert got == pytest.approx(float(loss_T.mean()), rel=2e-5, abs=1e-7), (name, term)


def test_the_rows_have_what_the_losses_differ_in() -> None:
    """Both clips hold somewhere, k3's cut-off too, groups have rows of unequal number, and
    penalties differ."""
    student_T = of_ids(STUDENTS["later"].log_softmax(1))
    ratio_T = (student_T - OLD_T).exp()
    assert bool((ratio_T > 1.2).any()) and bool((ratio_T < 0.8).any())
    for logits_TV in STUDENTS.values():
        cut_T = k3(logits_TV.log_softmax(1)) > 10
        assert bool(cut_T.any()) and not bool(cut_T.all())
    assert len({r.episode.turns for r in ROWS}) > 1 and any(r.penalty for r in ROWS)
    by_rows, by_episodes = (
        ours(method, OLD_TV, later=False)[1]
        for method in (over_rows(CATALOGUE["sdar"].method), CATALOGUE["sdar"].method)
    )
    assert not torch.allclose(by_rows, by_episodes, rtol=1e-2)


# ------------------------------------------------------------------------------------- the checker
def warnings_of(method: str, *overrides: str) -> list[str]:
    keys = [f"method={method}", "teacher=null", "skills={bank: x}", "self_teacher={}", *overrides]
    return check_method(load_config("demo", keys))


def test_the_checker_says_which_gates_have_no_teacher_in_them() -> None:
    """Though a reward stands beside, and the loss has the teacher's number in it."""
    for name in ("sdar_entropy", "grpo_opsd"):
        (warning,) = warnings_of(name)
        assert "method.sdar of" in warning and "it is so in the paper" in warning
    for name in ("sdar", "sdar_soft_or", "sdar_fkl", "sdar_rkl", "opsd", "rlsd", "skill_sd"):
        assert warnings_of(name) == []


def test_an_own_method_that_asks_in_vain_is_refused() -> None:
    term = (
        "{kind: policy_gradient, advantages: {each: {kind: constant}}, ratio: {kind: teacher_gap}, "
        "gates: {gate: {kind: sigmoid, beta: 0.0, anchor: current}}}"
    )
    own = "method={name: mine, terms: {policy: {kind: policy_gradient}, own: TERM}}"
    with pytest.raises(ConfigError, match=r"method\.own of method mine: .* teaches nothing"):
        warnings_of(own.removeprefix("method=").replace("TERM", term))
    # Beside another term that learns from the teacher it is a warning.
    other = own.replace("{policy:", "{distil: {kind: policy_gradient, advantages: {t: {kind: "
                        "log_ratio}}}, policy:")  # fmt: skip
    (warning,) = warnings_of(other.removeprefix("method=").replace("TERM", term))
    assert "method.own of method mine" in warning


# ---------------------------------------------------------------------------------------- the gates
@pytest.mark.parametrize("signal", ["log_ratio", "student_entropy", "soft_or"])
def test_a_gate_has_no_gradient_of_its_own(
    signal: Literal["log_ratio", "student_entropy", "soft_or"],
) -> None:
    """Differentiated through, it would add beta gap gate (1 - gate): the released code detaches."""
    gate = SigmoidGate("sigmoid", 5.0, signal, anchor="current")
    term = replace(CATALOGUE["sdar"].method.terms["sdar"], gates={"gate": gate})
    method = MethodConfig("m", {"sdar": term})
    _, got = ours(method, OLD_TV, later=False)
    student_TV = OLD_TV.log_softmax(1)
    gates = {
        "log_ratio": gap_gate(student_TV),
        "student_entropy": (5 * entropy(student_TV)).sigmoid(),
        "soft_or": (
            5 * (1 - (-entropy(student_TV)).exp() * (of_ids(student_TV) - TEACHER_T).sigmoid())
        ).sigmoid(),
    }
    leaf = OLD_TV.clone().requires_grad_()
    loss = -0.01 * (gates[signal] * of_ids(leaf.log_softmax(1))).mean()
    (want,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-8)
