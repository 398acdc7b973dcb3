"""The loss of the later methods on rows of several tokens, against loops in float64."""

import numpy as np
import pytest
import torch

from megatron_opd.checks.method import check_method
from megatron_opd.errors import ConfigError
from megatron_opd.methods import advantages, gates, ratios
from megatron_opd.methods.catalogue import CATALOGUE
from megatron_opd.methods.catalogue.shorthand import distil
from megatron_opd.methods.terms import PolicyGradientTerm
from megatron_opd.recipe.load import load_config
from tests.unit.test_parts import (
    IDS_T,
    NEW_TV,
    OLD_TV,
    REFERENCE_TV,
    ROWS,
    SAMPLER_TV,
    TEACHER_TV,
    V,
    entropy,
    loss_and_gradient,
    method_of,
    of_ids,
)

SAMPLED_T = torch.from_numpy(np.concatenate([r.sources < 2 for r in ROWS]))
COUNT = int(SAMPLED_T.sum())
OLD_T, TEACHER_T, REFERENCE_T, SAMPLER_T = (
    torch.from_numpy(of_ids(log_p_TV)).double()
    for log_p_TV in (OLD_TV, TEACHER_TV, REFERENCE_TV, SAMPLER_TV)
)


def gradient(per_token):
    """By the logits, of the sum over sampled tokens of per_token(the student's logprobs)."""
    leaf = NEW_TV.double().requires_grad_()
    student_T = leaf.log_softmax(1).gather(1, IDS_T[:, None])[:, 0]
    (result,) = torch.autograd.grad(per_token(student_T)[SAMPLED_T].sum(), leaf)
    return result


def places():
    """Row by row, the places of its tokens that were sampled."""
    ends = np.cumsum([r.num_tokens for r in ROWS])
    for r, end in zip(ROWS, ends, strict=True):
        yield [t for t in range(end - r.num_tokens, end) if SAMPLED_T[t]]


def clipped(student_T, anchor_T, advantages_T, dual=None):
    rho_T = (student_T - anchor_T).exp()
    gain_T = torch.minimum(rho_T * advantages_T, rho_T.clamp(0.8, 1.2) * advantages_T)
    if dual:
        gain_T = torch.where(advantages_T < 0, torch.maximum(gain_T, dual * advantages_T), gain_T)
    return gain_T


def exopd():
    def loss(student_T):
        value_T = 1.25 * TEACHER_T - 0.25 * REFERENCE_T - student_T.detach()
        return -(student_T - OLD_T).exp() * value_T / COUNT

    return gradient(loss)


def vopd():
    student_TV = NEW_TV.double().log_softmax(1)
    value_T = (student_TV.exp() * (student_TV - TEACHER_TV.double())).sum(1)

    def loss(student_T):
        return -(student_T - OLD_T).exp() * (TEACHER_T - student_T.detach() + value_T) / COUNT

    return gradient(loss)


def iw_opd():
    weights_T = torch.zeros(len(IDS_T), dtype=torch.float64)
    distance_T = (TEACHER_T - SAMPLER_T).abs()
    for row in places():
        for i, t in enumerate(row):
            behind = distance_T[row[:i]].sum() / distance_T[row].sum()
            weights_T[t] = 1 + 0.5 * (1 - behind)

    def loss(student_T):
        gain_T = clipped(student_T, OLD_T, TEACHER_T - SAMPLER_T, dual=3.0)
        return -weights_T * gain_T / COUNT

    return gradient(loss)


def opsa(fixed=False):
    entropy_T = torch.from_numpy(entropy(OLD_TV)).double()
    counted = entropy_T[SAMPLED_T]
    share_T = (entropy_T - counted.min()) / (counted.max() - counted.min())
    advantage_T = -torch.ones_like(share_T) if fixed else -0.5 - 0.5 * share_T
    chosen = int(np.ceil(0.2 * COUNT))
    threshold = OLD_T[SAMPLED_T].topk(chosen, largest=False).values.max()
    least_T = (OLD_T.le(threshold) & SAMPLED_T).double()

    def loss(student_T):
        return -least_T * (student_T - OLD_T).exp() * advantage_T / chosen

    return gradient(loss)


def top_d():
    reward_T = torch.log(0.5 + 0.5 * (TEACHER_T - SAMPLER_T).exp())
    return_T = torch.zeros_like(reward_T)
    groups = {}
    for r, row in zip(ROWS, places(), strict=True):
        groups.setdefault(r.group, []).extend(row)
        for i, t in enumerate(row):
            later = reward_T[row[i + 1 :]]
            return_T[t] = reward_T[t] + (later.mean() if len(later) else 0.0)
    for members in groups.values():
        values = return_T[members]
        return_T[members] = (values - values.mean()) / values.std()
    return gradient(lambda student_T: -clipped(student_T, SAMPLER_T, return_T) / COUNT)


WANTED = {
    "exopd": exopd,
    "vopd": vopd,
    "iw_opd": iw_opd,
    "opsa": opsa,
    "opsa_fixed": lambda: opsa(fixed=True),
    "top_d": top_d,
}


@pytest.mark.parametrize("name", WANTED)
def test_the_gradient_is_that_of_the_formula_token_by_token(name):
    _, got = loss_and_gradient(CATALOGUE[name].method)
    torch.testing.assert_close(got.double(), WANTED[name](), rtol=2e-5, atol=1e-6)


def test_sdars_loss_is_a_constant_advantage_behind_a_gate_that_moves():
    """-sg[sigmoid(beta (T - S))] S, as its code has it: facts of the gate are of the present."""
    term = PolicyGradientTerm(
        "policy_gradient",
        0.01,
        {"constant": advantages.ConstantAdvantage("constant")},
        ratio=ratios.NoRatio("none"),
        gates={"gap": gates.SigmoidGate("sigmoid", 5.0, anchor="current")},
    )
    _, got = loss_and_gradient(method_of({"t": term}))

    def loss(student_T):
        gate_T = (5.0 * (TEACHER_T - student_T)).sigmoid().detach()
        return -0.01 * gate_T * student_T / COUNT

    torch.testing.assert_close(got.double(), gradient(loss), rtol=2e-5, atol=1e-8)


def test_turns_count_alike_whatever_their_length():
    """A fourth of the weight stays with the tokens; every row here is a turn."""
    gate = gates.TurnBalanceGate("turn_balance", by_token=0.25)
    _, got = loss_and_gradient(method_of({"t": distil(gates={"turns": gate})}))
    turns = [row for row in places() if row]
    weights_T = torch.zeros(len(IDS_T), dtype=torch.float64)
    for row in turns:
        weights_T[row] = 0.25 + 0.75 * (COUNT / len(turns)) / len(row)
    assert float(weights_T.sum()) == pytest.approx(COUNT)

    def loss(student_T):
        value_T = TEACHER_T - student_T.detach()
        return -weights_T * (student_T - OLD_T).exp() * value_T / COUNT

    torch.testing.assert_close(got.double(), gradient(loss), rtol=2e-5, atol=1e-6)


def test_the_log_ratios_of_every_source_get_the_spread_of_all():
    gate = gates.SourceSpreadGate("source_spread", low=0.25, high=4.0)
    _, got = loss_and_gradient(method_of({"t": distil(gates={"sources": gate})}))
    delta_T = TEACHER_T - SAMPLER_T
    weights_T = torch.zeros_like(delta_T)
    for source in ("math", "code"):
        of_source = [t for r, row in zip(ROWS, places(), strict=True) for t in row
                     if r.task.source == source]  # fmt: skip
        ratio = delta_T[SAMPLED_T].std(correction=0) / delta_T[of_source].std(correction=0)
        weights_T[of_source] = float(ratio.clamp(0.25, 4.0))
    assert len(weights_T[SAMPLED_T].unique()) == 2

    def loss(student_T):
        value_T = TEACHER_T - student_T.detach()
        return -weights_T * (student_T - OLD_T).exp() * value_T / COUNT

    torch.testing.assert_close(got.double(), gradient(loss), rtol=2e-5, atol=1e-6)


def test_a_method_that_weighs_sources_needs_their_column():
    method = (
        "method={name: m, terms: {t: {kind: policy_gradient, advantages: {t: {kind: log_ratio}}, "
        "gates: {s: {kind: source_spread}}}}}"
    )
    with pytest.raises(ConfigError, match=r"data\.source_column: missing"):
        check_method(load_config("demo", [method]))
    check_method(load_config("demo", [method, "data.source_column=domain"]))


def test_a_baseline_takes_variance_and_leaves_the_expectation():
    """Enumerated over what could have been sampled at one state."""
    student = NEW_TV[0].double().log_softmax(0)
    teacher = TEACHER_TV[0].double()
    value = (student.exp() * (student - teacher)).sum()
    scores_VV = torch.eye(V, dtype=torch.float64) - student.exp()  # of each token, by the logits
    moments = {}
    for name, baseline in (("opd", 0.0), ("vopd", value)):
        estimates_VV = (teacher - student + baseline)[:, None] * scores_VV
        mean_V = (student.exp()[:, None] * estimates_VV).sum(0)
        squares = (estimates_VV - mean_V).square().sum(1)
        moments[name] = (mean_V, float((student.exp() * squares).sum()))
    torch.testing.assert_close(moments["opd"][0], moments["vopd"][0])
    assert moments["vopd"][1] < moments["opd"][1]
