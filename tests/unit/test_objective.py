"""Mechanics of the objective: clips, aggregation, gates, corrections, signals. Gradients:
test_method_gradients."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_opd.contracts.signals import Signals, StudentSignals, TeacherSignals
from megatron_opd.mcore.batch import Columns
from megatron_opd.methods.advantages import LogRatioAdvantage, LogRatioFactor, RewardAdvantage
from megatron_opd.methods.advantages.teacher import factor
from megatron_opd.methods.catalogue import CATALOGUE
from megatron_opd.methods.corrections import Correction
from megatron_opd.methods.gates import (
    EndGate,
    EntropyGate,
    EntropyQuantileGate,
    FinishedGate,
    ProbabilityGapGate,
    SigmoidGate,
    TrustGate,
)
from megatron_opd.methods.groups import group_advantages, overlong_penalty
from megatron_opd.methods.method import MethodConfig
from megatron_opd.methods.needs import active, fit_topk, is_on_policy, needs_of
from megatron_opd.methods.ratios import ClippedRatio, DetachedRatio, ShapedProbability, clipped
from megatron_opd.methods.schedules import CosineDecay, LinearDecay, Switch, weight_at
from megatron_opd.methods.terms import CrossEntropyTerm, PolicyGradientTerm, TopKTerm
from megatron_opd.objective.arithmetic import returns_to_go, whitened
from megatron_opd.objective.batch import Batch
from megatron_opd.objective.columns import build_columns, denominators, gates_at
from megatron_opd.objective.loss import Objective, finish
from megatron_opd.objective.view import View
from tests.rows import row
from tests.unit.categorical import OnLogits

V = 7


def batch_of(*rows, teacher=None, student=None, entropy=None, step=0):
    """logprobs of the teacher and the student per token."""
    tokens = sum(r.num_tokens for r in rows)
    zeros = np.zeros(tokens, np.float32)
    of_teacher = TeacherSignals(
        np.full(tokens, 5, np.int32), zeros if teacher is None else np.float32(teacher), zeros
    )
    of_student = StudentSignals(
        zeros if student is None else np.float32(student),
        zeros if entropy is None else np.float32(entropy),
    )
    return Batch(
        rows, Signals(of_teacher, None, of_student), seed=0, step=step, max_completion_tokens=10
    )


def gates_of(gates, batch):
    return gates_at(gates, batch, "before")


def columns_of(method, *rows, **signals):
    return build_columns(method, batch_of(*rows, **signals))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "stopped"),
    [
        (1.5, 2.0, -2.6, True),  # clip high binds: 1.3 * 2
        (1.5, -2.0, 3.0, False),  # a worse action made likelier is not clipped
        (0.5, -2.0, 1.6, True),  # clip low binds: 0.8 * -2
        (0.5, 2.0, -1.0, False),
        (1.0, 2.0, -2.0, False),
    ],
)
def test_clip_low_and_high(ratio, advantage, loss, stopped):
    new = torch.tensor([np.log(ratio)], dtype=torch.float32, requires_grad=True)
    value, active = clipped(new.exp(), torch.tensor([advantage]), 0.2, 0.3)
    value.sum().backward()
    assert value.item() == pytest.approx(loss, rel=1e-6)
    assert bool(active) is stopped
    assert (new.grad == 0).item() is stopped


def test_dual_clip_bounds_the_loss_of_negative_advantages():
    rho = torch.tensor([5.0, 5.0, 1.0], requires_grad=True)
    value, active = clipped(rho, torch.tensor([-1.0, 1.0, -1.0]), 0.2, 0.2, 3.0)
    value.sum().backward()
    torch.testing.assert_close(value, torch.tensor([3.0, -1.2, 1.0]))
    assert active.tolist() == [True, True, False] and (rho.grad == 0).tolist() == [
        True,
        True,
        False,
    ]


def test_advantages_are_normalised_within_groups_with_the_unbiased_deviation():
    rewards, groups = np.array([1, 0, 0, 1, 1, 1, 0.5]), np.array([0, 1, 0, 1, 2, 2, 3])
    std = np.sqrt(0.5)
    want = [
        0.5 / (std + 1e-6),
        -0.5 / (std + 1e-6),
        -0.5 / (std + 1e-6),
        0.5 / (std + 1e-6),
        0,
        0,
        0,
    ]
    np.testing.assert_allclose(group_advantages(rewards, groups, "std", 1e-6), want)
    np.testing.assert_allclose(
        group_advantages(rewards, groups, "mean", 1e-6)[:4], [0.5, -0.5, -0.5, 0.5]
    )


def test_leave_one_out_and_raw_rewards():
    rewards, groups = np.array([1.0, 0, 0, 0.5]), np.array([0, 0, 0, 1])
    np.testing.assert_allclose(
        group_advantages(rewards, groups, "leave_one_out", 1e-6), [1, -0.5, -0.5, 0]
    )
    np.testing.assert_allclose(group_advantages(rewards, groups, "none", 1e-6), rewards)


def test_returns_to_go_stay_within_their_sequence():
    values = torch.tensor([1.0, 2, 4, 8, 16], dtype=torch.float64)
    lengths = np.array([3, 2])
    torch.testing.assert_close(
        returns_to_go(values, lengths, 0.5, mean=False), values.new_tensor([3, 4, 4, 16, 16])
    )
    by_length = returns_to_go(values, lengths, 0.5, mean=True)
    torch.testing.assert_close(by_length, values.new_tensor([1, 2, 4, 8, 16]))


def test_whitening_is_of_the_tokens_that_count():
    white = whitened(torch.tensor([9.0, 1, 3]), torch.tensor([False, True, True]))
    torch.testing.assert_close(white, torch.tensor([0, -(0.5**0.5), 0.5**0.5]))


def test_overlong_responses_are_punished_softly():
    penalty = overlong_penalty(np.array([1, 80, 90, 100]), 100, 0.2)
    np.testing.assert_allclose(penalty, [0, 0, -0.5, -1])
    advantage = {"reward": RewardAdvantage("reward", normalise="none", overlong=0.5)}
    method = MethodConfig("", {"t": PolicyGradientTerm("policy_gradient", advantages=advantage)})
    columns = columns_of(method, row([1] * 10, reward=1.0), row([1] * 5, reward=1.0))
    assert columns.advantages_TJ[:, 0].tolist() == [0.0] * 10 + [1.0] * 5


# ------------------------------------------------------------------------------------- denominators
def test_aggregates():
    batch = batch_of(row([1, 2, 3]), row([4]), row([1, 2, 3, 4]))
    every = torch.ones(8, dtype=torch.float64)
    each = lambda aggregate: denominators(every, batch, aggregate)  # noqa: E731
    torch.testing.assert_close(each("token-mean"), every / 8)
    per_sequence = torch.tensor([1 / 9] * 3 + [1 / 3] + [1 / 12] * 4, dtype=torch.float64)
    torch.testing.assert_close(each("seq-mean-token-mean"), per_sequence)
    torch.testing.assert_close(each("seq-mean-token-sum"), every / 3)
    torch.testing.assert_close(each("seq-mean-token-sum-norm"), every / 30)
    torch.testing.assert_close(each("token-sum"), every)


def test_columns_of_each_row_and_term():
    columns = columns_of(CATALOGUE["tgpo"].method, row([2, 3], reward=1.0), row([4], sample=1))
    assert columns.ids_T.tolist() == [2, 3, 4] and columns.teacher_argmax_T.tolist() == [5, 5, 5]
    assert columns.advantages_TJ[:, 0].tolist() == pytest.approx(
        [2**-0.5, 2**-0.5, -(2**-0.5)], rel=1e-5
    )
    torch.testing.assert_close(
        columns.scales_TJ, torch.tensor([[1 / 3, 1 / 4], [1 / 3, 1 / 4], [1 / 3, 1 / 2]])
    )


@pytest.mark.parametrize("name", ["tropd_clip", "tgpo", "luffy"])
def test_tokens_the_student_did_not_sample_do_not_dilute_the_others(name):
    """Prefixes and traces have a term of their own; the scales of the sampled tokens do not see
    them."""
    method, own = CATALOGUE[name].method, (row([2, 3], reward=1.0), row([4]))
    alone = columns_of(method, *own).scales_TJ
    mixed = columns_of(method, *own, row([6, 6, 6], given=3), row([5, 5], given=1)).scales_TJ
    of_samples = [
        j
        for j, term in enumerate(method.terms.values())
        if not (
            (isinstance(term, CrossEntropyTerm) and term.targets == "trace")
            or isinstance(getattr(term, "ratio", None), ShapedProbability)
        )
    ]
    assert of_samples
    for j in of_samples:
        share = alone[:, j] / alone[:, j].sum()
        torch.testing.assert_close(mixed[:3, j] / mixed[:3, j].sum(), share)
        assert (mixed[[3, 4, 5, 6], j] == 0).all() and (mixed[7, j] > 0)


@pytest.mark.parametrize(("samples", "traces"), [(7, 1), (4, 1), (2, 2)])
def test_luffy_weighs_all_sequences_of_a_group_alike(samples, traces):
    """1 / (sequences x the longest), which with 7 samples and 1 trace are the paper's shares of 7/8
    and 1/8."""
    mixed = [row([2, 3], sample=i, reward=float(i == 0)) for i in range(samples)]
    mixed += [row([6, 6, 6], sample=samples + i, reward=1.0, given=3) for i in range(traces)]
    scales = columns_of(CATALOGUE["luffy"].method, *mixed).scales_TJ
    each = 1 / ((samples + traces) * 10)
    torch.testing.assert_close(scales[:, 0], torch.tensor([each] * 2 * samples + [0] * 3 * traces))
    torch.testing.assert_close(scales[:, 1], torch.tensor([0] * 2 * samples + [each] * 3 * traces))


@pytest.mark.parametrize("name", ["tropd", "tropd_expected", "tropd_mask", "tropd_clip"])
@pytest.mark.parametrize("given", [0, 1, 3])
def test_a_prefix_tokens_share_does_not_grow_as_prefixes_shrink(name, given):
    """TrOPD, Eq. 9: one mean over all tokens of a response, a prefix's with 1e-3; against the
    gradient in float64."""
    method = fit_topk(CATALOGUE[name].method, 3)
    batch = batch_of(
        row([2, 3, 4, 5], given=given), row([1, 2]), teacher=[-1.0] * 6, student=[-2.0] * 6
    )
    best = {
        "topk_ids_TK": np.tile(np.int32([4, 5, 6]), (6, 1)),
        "topk_logprobs_TK": np.full((6, 3), -2.0, np.float32),
    }
    signals = replace(batch.signals, teacher=replace(batch.signals.teacher, **best))
    columns = build_columns(method, replace(batch, signals=signals))
    logits = torch.randn(6, V, generator=torch.Generator().manual_seed(given), requires_grad=True)
    loss, _ = Objective(method, V, 1.0)(OnLogits(logits), columns, 0)
    (got,) = torch.autograd.grad(loss, logits)
    reference = logits.detach().double().requires_grad_()
    student = reference.log_softmax(1).gather(1, columns.ids_T[:, None])[:, 0]
    delta = -1.0 - student.detach()
    if name == "tropd_clip":
        delta = delta.clamp(min=np.log(0.3) / 0.7)
    # The gates are 1: the teacher likes every token better than the student did at the step's
    # start.
    ratio = (student + 2.0).exp()
    token_loss = torch.where(columns.sampled_T, -ratio * delta, -1e-3 * student)
    (want,) = torch.autograd.grad(token_loss.sum() / 6, reference)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-7)


def test_gates_leave_the_denominator_alone_unless_they_are_it():
    gated = {"entropy": EntropyQuantileGate("entropy_quantile", 0.5)}
    entropy = [1.0, 2.0, 3.0, 0.5]
    for denominator, scale in (("tokens", 1 / 4), ("gated", 1 / 2)):
        method = MethodConfig(
            "", {"t": PolicyGradientTerm("policy_gradient", gates=gated, denominator=denominator)}
        )
        scales = columns_of(method, row([1, 2, 3, 4]), entropy=entropy).scales_TJ[:, 0]
        torch.testing.assert_close(scales, torch.tensor([0, scale, scale, 0]))


# -------------------------------------------------------------------------------------------- gates
def test_entropy_quantile_is_of_the_whole_batch_and_of_sampled_tokens():
    batch = batch_of(row([1, 2, 3], given=1), row([4, 5]), entropy=[9.0, 1, 2, 3, 4])
    gate = gates_of({"g": EntropyQuantileGate("entropy_quantile", 0.5)}, batch)
    assert gate.tolist() == [0, 0, 0, 1, 1]
    assert gates_of({"g": EntropyQuantileGate("entropy_quantile", 1.0)}, batch).tolist() == [
        0,
        1,
        1,
        1,
        1,
    ]


def test_the_trust_region_is_drawn_once_per_rollout_with_the_right_probability():
    many = [row([1] * 50, group=g, sample=k) for g in range(20) for k in range(4)]
    batch = batch_of(*many, teacher=np.full(4000, np.log(0.3)), student=np.zeros(4000))
    first = gates_of({"t": TrustGate("trust")}, batch)
    assert torch.equal(first, gates_of({"t": TrustGate("trust")}, batch))
    assert first.mean().item() == pytest.approx(0.3, abs=4 * (0.21 / 4000) ** 0.5)
    torch.testing.assert_close(
        first + gates_of({"t": TrustGate("trust", invert=True)}, batch), torch.ones_like(first)
    )
    # It follows the row, not its place in the batch, and changes from step to step.
    signals = {"teacher": np.full(50, np.log(0.3)), "student": np.zeros(50)}
    assert torch.equal(
        gates_of({"t": TrustGate("trust")}, batch_of(many[7], **signals)), first[350:400]
    )
    assert not torch.equal(
        gates_of({"t": TrustGate("trust")}, batch_of(many[7], **signals, step=1)), first[350:400]
    )


def test_end_finished_and_sigmoid_gates():
    batch = batch_of(row([1, 2]), row([3, 4], finish_reason="length"), teacher=[0.0, 1, 2, -1])
    assert gates_of({"e": EndGate("not_end")}, batch).tolist() == [1, 0, 1, 1]
    assert gates_of({"f": FinishedGate("finished")}, batch).tolist() == [1, 1, 0, 0]
    sigmoid = gates_of({"s": SigmoidGate("sigmoid", 2.0)}, batch)
    torch.testing.assert_close(
        sigmoid, torch.tensor([0.0, 2, 4, -2], dtype=torch.float64).sigmoid()
    )


# -------------------------------------------------------------------------------------- corrections
@pytest.mark.parametrize(
    ("kind", "low", "high", "want"),
    [
        ("truncated", 0.0, 2.0, [1.0, 2.0, 0.5, 0.5]),
        ("masked", 0.6, 5.0, [1.0, 4.0, 0.0, 0.0]),
        ("sequence_truncated", 0.0, 3.0, [3.0, 3.0, 0.25, 0.25]),
        ("sequence_masked", 0.3, 5.0, [4.0, 4.0, 0.0, 0.0]),
        ("geometric", 0.6, 5.0, [1.0, 4.0, 0.0, 0.0]),
    ],
)
def test_rollout_corrections(kind, low, high, want):
    """Ratios 1 and 4 in one sequence, 1/2 and 1/2 in the other."""
    batch = batch_of(row([1, 2]), row([3, 4]), student=np.log([1.0, 4.0, 0.5, 0.5]) - 1.0)
    got = Correction(kind, high, low).value(batch)
    torch.testing.assert_close(got.float(), torch.tensor(want))


def test_a_correction_is_of_its_own_term_alone():
    terms = {
        "corrected": PolicyGradientTerm("policy_gradient", correction=Correction("truncated", 2.0)),
        "guidance": CrossEntropyTerm("cross_entropy", "teacher_argmax"),
    }
    scales = columns_of(MethodConfig("", terms), row([1, 2]), student=[-1.0, 0.0]).scales_TJ
    torch.testing.assert_close(scales, torch.tensor([[0.5, 0.5], [1.0, 0.5]]))


# --------------------------------------------------------------------------------------- estimators
def estimate(ratio, new, old, advantages, **columns):
    tokens = len(new)
    student = torch.tensor(new, requires_grad=True)
    empty = Columns(
        torch.zeros(tokens),
        torch.zeros(tokens, 1),
        torch.zeros(tokens).long(),
        torch.ones(tokens).bool(),
    )
    old = torch.tensor(old)
    columns = replace(empty, **({"old_logprobs_T": old} | columns))
    view = View(columns, 0, student, None, student[:, None][:, :0], student, None)
    value, stopped = ratio.loss(view, torch.tensor(advantages))
    value.sum().backward()
    return value.detach(), student.grad, stopped


def test_gspo_has_the_sequences_ratio_and_the_tokens_gradient():
    sequence = torch.tensor([3, 3, 8])
    value, grad, _ = estimate(
        ClippedRatio("sequence", None, None),
        [0.3, 0.1, -1.0],
        [0.0, 0.0, -1.0],
        [1.0, 1.0, 2.0],
        sequence_T=sequence,
    )
    mean = np.exp(0.2)
    torch.testing.assert_close(value, torch.tensor([-mean, -mean, -2.0], dtype=torch.float32))
    torch.testing.assert_close(grad, value)


def test_cispo_keeps_the_gradient_of_clipped_tokens():
    _, grad, stopped = estimate(
        DetachedRatio("detached", clip_high=1.0), [2.0, 0.0], [0.0, 0.0], [1.0, 1.0]
    )
    torch.testing.assert_close(grad, torch.tensor([-2.0, -1.0]))
    assert not stopped.any()


def test_luffys_shaped_probability():
    _, grad, _ = estimate(
        ShapedProbability("shaped", 0.1), [np.log(0.3), np.log(0.01)], [0.0, 0.0], [1.0, -2.0]
    )
    p = torch.tensor([0.3, 0.01], dtype=torch.float64)
    torch.testing.assert_close(grad, -0.1 * p / (p + 0.1) ** 2 * torch.tensor([1.0, -2.0]))


def test_rollout_ratio_is_to_the_sampler():
    value, _, _ = estimate(
        ClippedRatio("rollout", None, None), [0.5], [9.0], [1.0], rollout_logprobs_T=torch.zeros(1)
    )
    assert value.item() == pytest.approx(-np.exp(0.5))


def test_rlsd_multiplies_where_the_teacher_agrees():
    advantages, delta = torch.tensor([1.0, 1.0, -1.0, -1.0]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    torch.testing.assert_close(
        factor(advantages, delta, 0.5, 0.2), torch.tensor([1.1, 0.9, 0.9, 1.1])
    )
    term = PolicyGradientTerm(
        "policy_gradient", advantages={"reward": RewardAdvantage("reward", normalise="none"),
                                       "teacher": LogRatioFactor("log_ratio_factor")},
    )  # fmt: skip
    method = MethodConfig("", {"t": term})
    uniform = float(np.log(V))
    columns = columns_of(
        method, row([1, 2], reward=2.0), teacher=[-1.0, -3.0], student=[-uniform, -uniform]
    )
    loss, _ = Objective(method, V, 1.0)(OnLogits(torch.zeros(2, V)), columns, 0)
    assert loss.item() == pytest.approx(-(2.2 + 1.8) / 2, rel=1e-5)


# ----------------------------------------------------------------------------------------- the loss
def test_a_denominator_does_not_depend_on_another_terms_weight():
    method = CATALOGUE["tgpo"].method
    columns = columns_of(method, row([2, 3], reward=1.0), row([4]))
    logits = torch.randn(3, V)
    _, sums = Objective(method, V, 1.0)(OnLogits(logits), columns, 0)
    heavier = replace(
        method, terms=method.terms | {"guidance": replace(method.terms["guidance"], weight=9.0)}
    )
    _, same = Objective(heavier, V, 1.0)(OnLogits(logits), columns, 0)
    assert sums["objective/policy/loss"] == same["objective/policy/loss"]


@pytest.mark.parametrize(
    "name", [n for n, known in CATALOGUE.items() if not needs_of(known.method).teacher_head]
)
def test_empty_micro_batch_has_a_differentiable_loss_of_zero(name):
    none = torch.zeros(0)
    terms = len(CATALOGUE[name].method.terms)
    columns = Columns(
        none.long(),
        torch.zeros(0, terms),
        none.long(),
        none.bool(),
        torch.zeros(0, terms),
        torch.zeros(0, terms),
        none,
        none,
        none.long(),
        none,
        torch.zeros(0, 64).long(),
        torch.zeros(0, 64),
        none,
    )
    logits = torch.randn(0, 70, requires_grad=True)
    loss, sums = Objective(CATALOGUE[name].method, 70, 1.0)(OnLogits(logits), columns, 0)
    loss.backward()
    assert loss.item() == 0 and sums["tokens"] == 0


def test_a_term_that_does_not_count_a_token_does_not_see_its_infinity():
    """The guidance where the teacher's token does not exist for the student, and outside of a
    gate."""
    terms = {"t": TopKTerm("topk", 1, gates={"end": EndGate("not_end")})}
    batch = batch_of(row([1, 2]))
    teacher = replace(
        batch.signals.teacher,
        topk_ids_TK=np.array([[3], [6]], np.int32),
        topk_logprobs_TK=np.zeros((2, 1), np.float32),
    )
    columns = build_columns(
        MethodConfig("", terms), replace(batch, signals=Signals(teacher))
    )  # fmt: skip
    logits = torch.zeros(2, V, requires_grad=True)
    loss, _ = Objective(MethodConfig("", terms), 6, 1.0)(OnLogits(logits), columns, 0)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


# ------------------------------------------------------------------------------- schedules, signals
def test_weights_over_steps():
    weight = CATALOGUE["tgpo_annealing"].method.terms["guidance"].weight
    assert [weight_at(weight, step) for step in (0, 100, 200, 300)] == pytest.approx(
        [2e-3, 1e-3, 0, 0]
    )
    assert weight_at(LinearDecay(1.0, 0.5, 0.25), 2) == 0.25
    cosine = CosineDecay("cosine", 2.0, 10, 1.0)
    assert [weight_at(cosine, step) for step in (0, 5, 10, 99)] == pytest.approx([2, 1.5, 1, 1])
    assert [weight_at(Switch("switch", 1.0, 3, 0.5), step) for step in (0, 2, 3)] == [1.0, 1.0, 0.5]


def test_a_signal_whose_weight_has_reached_zero_is_not_asked_for():
    annealing = CATALOGUE["tgpo_annealing"].method
    assert needs_of(active(annealing, 199)).teacher and not needs_of(active(annealing, 201)).teacher
    batch = replace(batch_of(row([2, 3], reward=1.0), row([4])), signals=Signals(), step=201)
    columns = build_columns(annealing, batch)
    loss, sums = Objective(annealing, V, 1.0)(OnLogits(torch.randn(3, V)), columns, 201)
    assert torch.isfinite(loss) and "objective/guidance/loss" not in sums
    assert not needs_of(active(CATALOGUE["opd_then_rl"].method, 60)).teacher


GATED_BY_TEACHER = {
    "trust": TrustGate("trust"),
    "gap": ProbabilityGapGate("probability_gap"),
    "entropy": EntropyGate("entropy", 0.8),
    "sigmoid": SigmoidGate("sigmoid"),
}


@pytest.mark.parametrize("gate", GATED_BY_TEACHER)
def test_a_term_that_has_decayed_needs_no_signal_of_its_gates(gate):
    weight = LinearDecay(1.0, 0.5)
    log_ratio = LogRatioAdvantage("log_ratio", anchor="old", discount=0.9)
    decaying = {
        "argmax": CrossEntropyTerm(
            "cross_entropy", "teacher_argmax", weight, {gate: GATED_BY_TEACHER[gate]}
        ),
        "distil": PolicyGradientTerm("policy_gradient", weight, {"teacher": log_ratio}),
    }
    method = MethodConfig("", {**decaying, "policy": PolicyGradientTerm("policy_gradient")})
    batch = batch_of(row([2, 3], reward=1.0), row([4]), student=[-1.0, -2.0, -3.0], step=2)
    assert not needs_of(active(method, 2)).teacher
    columns = build_columns(
        method,
        replace(batch, signals=replace(batch.signals, teacher=None)),
    )
    assert (
        columns.scales_TJ[:, :2].tolist()
        == columns.advantages_TJ[:, :2].tolist()
        == [[0.0, 0.0]] * 3
    )
    leaf = torch.randn(3, V, requires_grad=True)
    loss, _ = Objective(method, V, 1.0)(OnLogits(leaf), columns, 2)
    alone = MethodConfig("", {"policy": method.terms["policy"]})
    columns_alone = build_columns(alone, batch)
    expected, _ = Objective(alone, V, 1.0)(OnLogits(leaf), columns_alone, 2)
    (got,) = torch.autograd.grad(loss, leaf)
    (want,) = torch.autograd.grad(expected, leaf)
    torch.testing.assert_close(got, want)


# the teacher's part of needs_of(): (teacher, top-k, whole distribution, reference, pass before the
# update)
SIGNALS = {
    "sft": (False, 0, False, False, False),
    "grpo": (False, 0, False, False, False),
    "simplerl_zero": (False, 0, False, True, False),
    "luffy": (False, 0, False, False, False),
    "tgpo": (True, 0, False, False, False),
    "trrd": (True, 0, False, True, False),
    "eopd": (True, 16, False, False, False),
    "tropd": (True, 64, False, False, True),
    "entropy_opd": (True, 0, False, False, True),
    "gkd": (False, 0, True, False, False),
}


@pytest.mark.parametrize("name", SIGNALS)
def test_signals_follow_from_the_terms(name):
    needs = needs_of(CATALOGUE[name].method)
    got = (needs.teacher, needs.topk, needs.teacher_head, needs.reference, needs.student_pass)
    assert got == SIGNALS[name]
    assert needs.rollouts == (name != "sft") and needs.traces == (
        name in ("sft", "luffy", "tropd", "gkd")
    )
    assert needs.rewards == (name in ("grpo", "simplerl_zero", "luffy", "tgpo", "trrd"))
    assert needs_of(CATALOGUE[name].method, updates_per_step=2).student_pass


def test_a_share_of_the_steps_is_on_policy():
    gkd = CATALOGUE["gkd"].method
    drawn = [is_on_policy(gkd, 3, step) for step in range(2000)]
    assert drawn == [is_on_policy(gkd, 3, step) for step in range(2000)]
    assert np.mean(drawn) == pytest.approx(0.5, abs=0.05)
    assert all(is_on_policy(CATALOGUE["tgpo"].method, 3, step) for step in range(50))


def test_means_are_over_tokens_and_losses_are_sums():
    sums = {
        "tokens": 4.0,
        "student/entropy/mean": 8.0,
        "train/loss": 3.0,
        "objective/policy/clip_fraction": 1.0,
    }
    assert finish(sums) == {
        "student/entropy/mean": 2.0,
        "train/loss": 3.0,
        "objective/policy/clip_fraction": 0.25,
    }
