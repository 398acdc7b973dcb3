"""The expected gradient of every method of the catalogue, enumerated on one state, against its
formula in float64."""

import math
from dataclasses import replace

import pytest
import torch

from megatron_opd.methods.advantages import LogRatioAdvantage
from megatron_opd.methods.catalogue import CATALOGUE
from megatron_opd.methods.method import MethodConfig
from megatron_opd.methods.ratios import ClippedRatio, NoRatio, TeacherRatio
from megatron_opd.methods.terms import PolicyGradientTerm
from tests.unit.categorical import (
    PROCESS,
    REFERENCE,
    REWARDS,
    STUDENT_LOGITS,
    TEACHER,
    K,
    V,
    every_token,
    expected_gradient,
)

z = STUDENT_LOGITS.double()
S, T, R = z.softmax(0), TEACHER.double().exp(), REFERENCE.double().exp()
DELTA = T.log() - S.log()
ADVANTAGES = (REWARDS.double() - REWARDS.double().mean()) / (REWARDS.double().std() + 1e-6)
CENTRED = REWARDS.double() - REWARDS.double().mean()
FLOOR = math.log(0.3) / 0.7
WRONG = (REWARDS == 0).double()
BEST = int(T.argmax())
TOP = T.topk(K).indices
UNIFORM = every_token().uniform_T


def gradient(function):
    """d function(log p) / d logits, p the student's distribution."""
    leaf = z.clone().requires_grad_()
    (result,) = torch.autograd.grad(function(leaf.log_softmax(0)), leaf)
    return result


def sampled(coefficients):
    """The gradient of -sg[c(v)] log p(v), in expectation over v ~ p."""
    return gradient(lambda log_p: -(S * coefficients * log_p).sum())


def mixture(log_p):
    return 0.5 * T + 0.5 * log_p.exp()


RKL = gradient(lambda log_p: (log_p.exp() * (log_p - T.log())).sum())
FKL = gradient(lambda log_p: (T * (T.log() - log_p)).sum())
JSD = gradient(
    lambda log_p: (
        0.5 * (T * (T.log() - mixture(log_p).log())).sum()
        + 0.5 * (log_p.exp() * (log_p - mixture(log_p).log())).sum()
    )
)
TEACHER_HALF = gradient(
    lambda log_p: 0.5 * (T[TOP] * (T[TOP].log() - mixture(log_p)[TOP].log())).sum()
)
TOPK = gradient(lambda log_p: (T[TOP] * (T[TOP].log() - log_p[TOP])).sum())
GUIDANCE = gradient(lambda log_p: -log_p[BEST])
ENTROPY = gradient(lambda log_p: -(log_p.exp() * log_p).sum())
# k3 differentiated: the forward KL's
REFERENCE_KL = gradient(lambda log_p: (R * (R.log() - log_p)).sum())
GRPO = sampled(ADVANTAGES)
CLIPPED_DELTA = DELTA.clamp(min=FLOOR)
ABOVE = (DELTA >= FLOOR).double()
TRUST = DELTA.exp().clamp(max=1)
DRAWN = (UNIFORM < TRUST).double()
LOW = (T - S <= 0).double()


def outliers(mask):
    return (S * (1 - mask)).sum() * TOPK


def trrd():
    rho = (0.5 * (-DELTA).clamp(-1, 1)).exp()
    live = torch.where(ADVANTAGES > 0, rho <= 1.2, rho >= 0.8).double()
    # where the clamp holds, only the old policy's half carries a gradient
    inside = (DELTA.abs() <= 1).double()
    return sampled(ADVANTAGES * rho * live * (0.5 + 0.5 * inside))


def prime():
    """Rewards and implicit rewards, each minus the mean of the others', whitened together."""
    implicit = 0.05 * (PROCESS.double() - R.log())
    alone = [each - (each.sum() - each) / (V - 1) for each in (REWARDS.double(), implicit)]
    return sampled((sum(alone) - sum(alone).mean()) / sum(alone).std())


def standard(values):
    return (values - values.mean()) / values.std()


LEAST = (z <= z.topk(2, largest=False).values.max()).double()  # ceil(20 % of 7 tokens)
REFERENCE_DELTA = R.log() - S.log()
WHITE = (DELTA - DELTA.mean()) / DELTA.std()  # the batch of the test holds every token once
JSD_ADVANTAGE = 0.5 * (0.5 + 0.5 * DELTA.exp()).log()
KEPT_CLOSE = 0.01 * REFERENCE_KL - 1e-3 * ENTROPY
GATE = (5 * DELTA).sigmoid()
STUDENT_ENTROPY = -(S * S.log()).sum()
SOFT_OR = 1 - (-STUDENT_ENTROPY).exp() * (-DELTA).sigmoid()
SIGN = (ADVANTAGES.sign() * DELTA).exp().clamp(0.8, 1.2)
EXPECTED = {
    "grpo": GRPO,
    "grpo++": GRPO,
    "dapo": GRPO,
    "gspo": GRPO,
    "cispo": GRPO,
    "dr_grpo": sampled(CENTRED) / V,
    "prime": prime(),
    # a group without its trace; with it: test_objective
    "luffy": sampled(CENTRED) / V - 1e-3 * ENTROPY,
    "simplerl_zero": GRPO + 1e-4 * REFERENCE_KL - 1e-3 * ENTROPY,
    "tgpo": GRPO + 2e-3 * GUIDANCE,
    "tgpo_annealing": GRPO + 2e-3 * GUIDANCE,
    "tgpo_r": GRPO,  # a state-only reward: the teacher is not in it
    "tgpo_r_indicator": GRPO + 0.1 * sampled(torch.eye(V, dtype=torch.float64)[BEST]),
    "tgpo_r_teacher": GRPO + 0.1 * sampled(T.log()),
    "rkl": RKL,
    "opd": RKL,
    "kdrl": GRPO + 2e-3 * RKL,
    "kdrl_annealing": GRPO + 5e-3 * RKL,
    "kdrl_response_mask": GRPO + 2e-3 * sampled(WRONG * DELTA),
    "kdrl_group_mask": GRPO,
    "opd_then_rl": RKL,
    "trrd": trrd() + 1e-3 * REFERENCE_KL,
    "mask_outlier": sampled(ABOVE * DELTA),
    "reopold": sampled(CLIPPED_DELTA),
    "reopold_2stage": sampled(ABOVE * CLIPPED_DELTA) * V / ABOVE.sum(),
    "entropy_opd": RKL,  # one state, one entropy: every token is among the highest
    "eopd": RKL + (TOPK / T[TOP].sum()) * float(-(T * T.log()).sum() > 0.8),
    "full_fkl": TOPK,
    "full_fkl_reward": torch.zeros(V, dtype=torch.float64),
    "fkl_outlier": sampled(DRAWN * DELTA) + outliers(DRAWN),
    "tropd": sampled(DRAWN * DELTA) + outliers(DRAWN),
    "tropd_expected": sampled(TRUST * DELTA) + outliers(TRUST),
    "tropd_mask": sampled(ABOVE * DELTA),
    "tropd_clip": sampled(CLIPPED_DELTA),
    "aopd": sampled((1 - LOW) * DELTA) + outliers(1 - LOW) / K,
    "tropd_aopd": sampled(DRAWN * DELTA) + outliers(DRAWN) + outliers(1 - LOW) / K,
    "jsd": JSD,
    "jsd_tropd": TEACHER_HALF + sampled(JSD_ADVANTAGE),
    "gkd": JSD,
    "minillm": sampled(WHITE) + RKL,
    "exopd": sampled(1.25 * DELTA - 0.25 * REFERENCE_DELTA),
    "vopd": RKL,  # the baseline takes variance, and nothing else
    "iw_opd": 1.5 * RKL,  # a first token has everything before it
    "opsa": sampled(-0.5 * LEAST) * V / 2,  # one state, one entropy
    "opsa_fixed": sampled(-LEAST) * V / 2,
    "top_d": sampled(standard((0.5 + 0.5 * DELTA.exp()).log())),
    "grpo_agents": GRPO + KEPT_CLOSE,
    "sdar": GRPO + KEPT_CLOSE + 0.01 * sampled(GATE),
    "sdar_entropy": GRPO + KEPT_CLOSE,  # of the state alone: the teacher is not in it
    "sdar_soft_or": GRPO + KEPT_CLOSE + 0.01 * sampled((5 * SOFT_OR).sigmoid()),
    "sdar_fkl": GRPO + KEPT_CLOSE + 0.01 * (S * GATE).sum() * FKL,
    "sdar_jsd": GRPO + KEPT_CLOSE + 0.01 * (S * GATE).sum() * JSD,
    "sdar_rkl": GRPO + KEPT_CLOSE + 0.01 * sampled(GATE * DELTA),
    "opsd": KEPT_CLOSE + 0.01 * sampled(GATE),
    "grpo_opsd": GRPO + KEPT_CLOSE,  # a half of the score function, whose expectation is 0
    "rlsd": sampled(ADVANTAGES * (0.505 + 0.495 * SIGN)) + KEPT_CLOSE,
    "skill_sd": GRPO + KEPT_CLOSE + 1e-3 * RKL,
    "skill_sd_warm_down": GRPO + KEPT_CLOSE + 9.9e-4 * RKL,
}


@pytest.mark.parametrize("name", [name for name in CATALOGUE if name != "sft"])
def test_expected_gradient_is_the_formula(name):
    torch.testing.assert_close(
        expected_gradient(CATALOGUE[name].method), EXPECTED[name], rtol=2e-5, atol=2e-6
    )


@pytest.mark.parametrize(
    "name", ["grpo", "opd", "tgpo", "tropd_expected", "full_fkl", "gkd", "simplerl_zero"]
)
def test_tokens_of_a_mixture_have_the_students_expectation(name):
    method = replace(CATALOGUE[name].method, teacher_share=0.3, on_policy_fraction=1.0)
    torch.testing.assert_close(expected_gradient(method), EXPECTED[name], rtol=2e-5, atol=2e-6)


LATER = {
    ("opd_then_rl", 60): GRPO,
    ("reopold_2stage", 100): sampled(CLIPPED_DELTA),
    ("tgpo_annealing", 200): GRPO,
    ("kdrl_annealing", 300): GRPO + 1e-3 * RKL,
    ("rlsd", 99): GRPO + KEPT_CLOSE,
    ("skill_sd_warm_down", 99): GRPO + KEPT_CLOSE,
}


@pytest.mark.parametrize(("name", "step"), LATER)
def test_schedules_change_the_gradient(name, step):
    torch.testing.assert_close(
        expected_gradient(CATALOGUE[name].method, step), LATER[name, step], rtol=2e-5, atol=2e-6
    )


def test_a_group_without_a_right_response_is_distilled():
    got = expected_gradient(CATALOGUE["kdrl_group_mask"].method, rewards=torch.zeros(V))
    torch.testing.assert_close(got, 2e-3 * RKL, rtol=2e-5, atol=2e-6)


def distil(transform, mix=None):
    advantage = LogRatioAdvantage("log_ratio", transform=transform, mix=mix)
    return MethodConfig(
        "",
        {"t": PolicyGradientTerm("policy_gradient", 1.0, {"teacher": advantage}, NoRatio("none"))},
    )


@pytest.mark.parametrize(
    ("transform", "mix", "want"),
    [("identity", None, RKL), ("expm1", None, FKL), ("mixture", 0.5, JSD)],
)
def test_a_function_of_the_log_ratio_is_a_divergence(transform, mix, want):
    torch.testing.assert_close(
        expected_gradient(distil(transform, mix)), want, rtol=2e-5, atol=2e-6
    )


def test_k2_differentiated_is_the_policy_gradient_of_the_log_ratio_sample_by_sample():
    leaf = z.clone().requires_grad_()
    k2_V = 0.5 * (T.log() - leaf.log_softmax(0)).square()
    log_p = leaf.log_softmax(0)
    for v in range(V):
        (of_k2,) = torch.autograd.grad(k2_V[v], leaf, retain_graph=True)
        (of_pg,) = torch.autograd.grad(-DELTA[v] * log_p[v], leaf, retain_graph=True)
        torch.testing.assert_close(of_k2, of_pg)


def test_trrd_at_alpha_one_is_grpo_bit_for_bit():
    by_ratio = [
        expected_gradient(
            MethodConfig("", {"p": PolicyGradientTerm("policy_gradient", ratio=ratio)})
        )
        for ratio in (TeacherRatio("teacher_share", alpha=1.0), ClippedRatio("old"))
    ]
    assert torch.equal(*by_ratio)


def test_the_catalogue_is_covered():
    assert EXPECTED.keys() | {"sft"} == CATALOGUE.keys()
