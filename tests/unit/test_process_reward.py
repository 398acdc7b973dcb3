"""PRIME's two halves: what a token of a response is worth, and what the process model learns from
the response."""

import numpy as np
import pytest
import torch

from megatron_opd.contracts.signals import Signals
from megatron_opd.methods.catalogue import CATALOGUE
from megatron_opd.objective.batch import Batch
from megatron_opd.objective.columns import build_columns
from megatron_opd.objective.process_reward import ProcessRewardObjective, process_columns
from tests.rows import row
from tests.unit.categorical import OnLogits

V, BETA = 7, 0.05
# (group, tokens, reward, given tokens)
RESPONSES = [
    (0, [1, 2, 3], 1.0, 0),
    (0, [4], 0.0, 0),
    (0, [5, 6], 0.0, 1),
    (1, [1, 1], 1.0, 0),
    (1, [2, 0, 3], 1.0, 0),
]
TOKENS = sum(len(tokens) for _, tokens, _, _ in RESPONSES)


@pytest.fixture
def batch() -> Batch:
    random = np.random.default_rng(1)
    rows = [
        row(tokens, sample=i, group=group, reward=reward, given=given, logprobs=0.0)
        for i, (group, tokens, reward, given) in enumerate(RESPONSES)
    ]
    reference, process = (random.normal(size=TOKENS).astype(np.float32) for _ in range(2))
    return Batch(
        rows,
        Signals(reference_logprobs_T=reference, process_logprobs_T=process),
        seed=0,
        step=0,
        max_completion_tokens=8,
    )


def test_a_token_is_worth_the_relative_rewards_from_it_on(batch):
    bounds = np.cumsum([0] + [len(tokens) for _, tokens, _, _ in RESPONSES])
    implicit = BETA * (batch.logprob("process") - batch.logprob("reference")).numpy()
    rewards = [
        implicit[a + r.num_given : b]
        for a, b, r in zip(bounds, bounds[1:], batch.rows, strict=False)
    ]
    want, sampled = [], []
    for i, own in enumerate(rewards):
        others = [j for j, r in enumerate(batch.rows) if j != i and r.group == batch.rows[i].group]
        process = own - np.mean([rewards[j].mean() for j in others])
        outcome = batch.rows[i].reward - np.mean([batch.rows[j].reward for j in others])
        given = batch.rows[i].num_given
        want += [0.0] * given + [process[t:].sum() + outcome for t in range(len(own))]
        sampled += [False] * given + [True] * len(own)
    want, sampled = np.array(want), np.array(sampled)
    white = np.where(sampled, (want - want[sampled].mean()) / want[sampled].std(ddof=1), 0)
    columns = build_columns(CATALOGUE["prime"].method, batch)
    np.testing.assert_allclose(columns.advantages_TJ[:, 0], white, rtol=1e-5, atol=1e-6)


def test_the_process_model_learns_to_tell_right_responses(batch):
    logits_TV = torch.randn(
        TOKENS, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    logits_TV.requires_grad_()
    columns = process_columns(batch)
    loss, sums = ProcessRewardObjective(BETA, V, 1.0)(OnLogits(logits_TV), columns, 0)
    (got,) = torch.autograd.grad(loss, logits_TV)
    logprobs_T = logits_TV.log_softmax(1)[torch.arange(TOKENS), columns.ids_T]
    ratio_T = (logprobs_T - batch.logprob("reference")) * batch.sampled_T
    losses, right = [], []
    for i, r in enumerate(batch.rows):
        probability = torch.sigmoid(BETA * ratio_T[batch.sequence_T == i].sum())
        losses.append(-torch.log(probability if r.reward else 1 - probability))
        right.append(float((probability > 0.5) == bool(r.reward)))
    (want,) = torch.autograd.grad(torch.stack(losses).mean(), logits_TV)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)
    assert float(loss.detach()) == pytest.approx(
        float(torch.stack(losses).mean().detach()), rel=1e-6
    )
    assert float(sums["accuracy"]) == pytest.approx(np.mean(right))


def test_one_update_teaches(batch):
    """A step against the gradient raises what a right response gets and lowers what a wrong one
    gets."""
    logits_TV = torch.zeros(TOKENS, V, requires_grad=True)
    columns = process_columns(batch)
    objective = ProcessRewardObjective(BETA, V, 1.0)
    before, _ = objective(OnLogits(logits_TV), columns, 0)
    (gradient,) = torch.autograd.grad(before, logits_TV)
    after, _ = objective(OnLogits(logits_TV.detach() - 10 * gradient), columns, 0)
    assert after < before
