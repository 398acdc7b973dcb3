"""Terms of the loss: exact expected gradients on an enumerable policy, denominators, advantages, schedules."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from megatron_opd.config.methods import CATALOGUE
from megatron_opd.config.schema import CrossEntropyTerm, LinearDecay, MethodConfig, PolicyGradientTerm
from megatron_opd.mcore.batch import Columns
from megatron_opd.mcore.vocab_parallel import logprobs
from megatron_opd.objective.columns import build_columns, group_advantages, token_scales
from megatron_opd.objective.loss import Objective, finish, policy_gradient
from megatron_opd.objective.plan import Plan, plan, weight_at
from megatron_opd.records import Prompt, Rollout, TeacherSignals

V = 7


def rollout(tokens, *, group=0, reward=0.0):
    prompt = Prompt(group, "", "", "", np.array([1], np.int32))
    n = len(tokens)
    ids = np.array(tokens, np.int32)
    return Rollout(prompt, 0, ids, np.full(n, -1.0, np.float32), "", "stop", 0, group=group, reward=reward)


@dataclass
class OnLogits:
    """A head whose logits are given."""

    logits_TV: torch.Tensor

    def logprobs(self, ids_TK, **settings):
        return logprobs(self.logits_TV, ids_TK, None, **settings)


def objective(*terms):
    return Objective(MethodConfig("test", {f"term{i}": t for i, t in enumerate(terms)}), V, 1.0)


def gradient_on_every_token(term, *, advantages=None, argmax=None):
    """The expected gradient of `term` for one categorical state: all tokens, each weighted with its probability."""
    logits = torch.linspace(-1, 2, V).sin().repeat(V, 1).requires_grad_()
    probabilities = logits[0].softmax(0).detach()
    columns = Columns(
        ids_T=torch.arange(V),
        scales_TJ=probabilities[:, None],
        advantages_T=advantages,
        teacher_argmax_T=None if argmax is None else torch.full((V,), argmax),
    )
    loss, _ = objective(term)(OnLogits(logits), columns, 0)
    loss.backward()
    return logits.grad.sum(0).double(), logits[0].detach().double()


def reference_gradient(function, logits):
    z = logits.clone().requires_grad_()
    function(z.log_softmax(0)).backward()
    return z.grad


def test_policy_gradient_is_the_gradient_of_the_expected_reward():
    rewards = torch.randn(V, generator=torch.Generator().manual_seed(0))
    got, logits = gradient_on_every_token(PolicyGradientTerm("policy_gradient"), advantages=rewards)
    want = reference_gradient(lambda log_p: -(log_p.exp() * rewards.double()).sum(), logits)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_guidance_is_the_gradient_of_the_cross_entropy_to_the_teachers_argmax():
    got, logits = gradient_on_every_token(CrossEntropyTerm("cross_entropy", "teacher_argmax"), argmax=4)
    torch.testing.assert_close(got, reference_gradient(lambda log_p: -log_p[4], logits), rtol=1e-5, atol=1e-6)


def test_guidance_depends_on_the_teacher():
    term = CrossEntropyTerm("cross_entropy", "teacher_argmax")
    assert not torch.equal(gradient_on_every_token(term, argmax=4)[0], gradient_on_every_token(term, argmax=3)[0])


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.5, 2.0, -2.6, True),  # clip high binds: 1.3 * 2
        (1.5, -2.0, 3.0, False),  # a worse action made likelier is not clipped
        (0.5, -2.0, 1.6, True),  # clip low binds: 0.8 * -2
        (0.5, 2.0, -1.0, False),
        (1.0, 2.0, -2.0, False),
    ],
)
def test_clip_low_and_high(ratio, advantage, loss, clipped):
    old = torch.zeros(1)
    new = torch.tensor([np.log(ratio)], dtype=torch.float32, requires_grad=True)
    value, active = policy_gradient(new, old, torch.tensor([advantage]), 0.2, 0.3)
    value.sum().backward()
    assert value.item() == pytest.approx(loss, rel=1e-6)
    assert bool(active) is clipped
    assert (new.grad == 0).item() is clipped


def test_advantages_are_normalised_within_groups_with_the_unbiased_deviation():
    rewards, groups = np.array([1, 0, 0, 1, 1, 1, 0.5]), np.array([0, 1, 0, 1, 2, 2, 3])
    std = np.sqrt(0.5)
    want = [0.5 / (std + 1e-6), -0.5 / (std + 1e-6), -0.5 / (std + 1e-6), 0.5 / (std + 1e-6), 0, 0, 0]
    np.testing.assert_allclose(group_advantages(rewards, groups, "std", 1e-6), want)
    np.testing.assert_allclose(group_advantages(rewards, groups, "mean", 1e-6)[:4], [0.5, -0.5, -0.5, 0.5])


def test_scales_add_up_to_one_and_follow_the_aggregation():
    lengths = np.array([3, 1, 4])
    np.testing.assert_allclose(token_scales(lengths, "token-mean"), np.full(8, 1 / 8))
    per_sequence = token_scales(lengths, "seq-mean-token-mean")
    np.testing.assert_allclose([per_sequence[:3].sum(), per_sequence[3:4].sum(), per_sequence[4:].sum()], [1 / 3] * 3)


def test_columns_of_each_rollout_and_term():
    method = CATALOGUE["tgpo"].method
    rollouts = [rollout([2, 3], reward=1.0), rollout([4], reward=0.0)]
    teacher = TeacherSignals(np.array([5, 6, 0], np.int32), np.zeros(3, np.float32), np.zeros(3, np.float32))
    columns = build_columns(method, rollouts, teacher)
    assert columns.ids_T.tolist() == [2, 3, 4]
    assert columns.teacher_argmax_T.tolist() == [5, 6, 0]
    assert columns.advantages_T.tolist() == pytest.approx([2**-0.5, 2**-0.5, -(2**-0.5)], rel=1e-5)
    torch.testing.assert_close(columns.scales_TJ, torch.tensor([[1 / 3, 1 / 4], [1 / 3, 1 / 4], [1 / 3, 1 / 2]]))


def test_a_denominator_does_not_depend_on_another_terms_weight():
    method = CATALOGUE["tgpo"].method
    columns = build_columns(method, [rollout([2, 3], reward=1.0), rollout([4])],
                            TeacherSignals(np.array([5, 6, 0], np.int32), np.zeros(3), np.zeros(3)))  # fmt: skip
    logits = torch.randn(3, V)
    _, sums = Objective(method, V, 1.0)(OnLogits(logits), columns, 0)
    _, same = objective(*method.terms.values())(OnLogits(logits), columns, 10**6)
    assert sums["objective/policy/loss"] == same["objective/term0/loss"]


def test_empty_micro_batch_has_a_differentiable_loss_of_zero():
    columns = Columns(torch.zeros(0, dtype=torch.long), torch.zeros(0, 1), advantages_T=torch.zeros(0))
    logits = torch.randn(0, V, requires_grad=True)
    loss, sums = objective(PolicyGradientTerm("policy_gradient"))(OnLogits(logits), columns, 0)
    loss.backward()
    assert loss.item() == 0 and sums["tokens"] == 0


def test_linear_decay_reaches_its_floor_and_then_the_teacher_is_not_asked():
    annealing = CATALOGUE["tgpo_annealing"].method
    weight = annealing.terms["guidance"].weight
    assert [weight_at(weight, step) for step in (0, 100, 200, 300)] == pytest.approx([2e-3, 1e-3, 0, 0])
    assert weight_at(LinearDecay(1.0, 0.5, 0.25), 2) == 0.25
    at_work = Objective(annealing, V, 1.0)
    assert at_work.asks_teacher(199) and not at_work.asks_teacher(201)
    columns = build_columns(annealing, [rollout([2, 3], reward=1.0), rollout([4])], None)
    loss, sums = at_work(OnLogits(torch.randn(3, V)), columns, 201)
    assert torch.isfinite(loss) and "objective/guidance/loss" not in sums


@pytest.mark.parametrize(
    ("name", "signals"),
    [
        ("sft", Plan(rollouts=False, rewards=False, teacher=False)),
        ("grpo", Plan(rollouts=True, rewards=True, teacher=False)),
        ("grpo++", Plan(rollouts=True, rewards=True, teacher=False)),
        ("tgpo", Plan(rollouts=True, rewards=True, teacher=True)),
        ("tgpo_annealing", Plan(rollouts=True, rewards=True, teacher=True)),
    ],
)
def test_signals_follow_from_the_terms(name, signals):
    assert plan(CATALOGUE[name].method) == signals


def test_means_are_over_tokens_and_losses_are_sums():
    assert finish({"tokens": 4.0, "student/entropy/mean": 8.0, "train/loss": 3.0}) == {
        "student/entropy/mean": 2.0,
        "train/loss": 3.0,
    }
