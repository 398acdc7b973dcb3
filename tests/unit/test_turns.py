"""Rows of conversations: an environment's words are read and never counted, whatever the method."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_opd.contracts.rows import Row, Source, StepRecord, episodes_of
from megatron_opd.contracts.signals import Signals, StudentSignals, TeacherSignals
from megatron_opd.doctor.rows import begun_with_trace
from megatron_opd.methods.advantages import LogRatioAdvantage, RewardAdvantage
from megatron_opd.methods.catalogue import CATALOGUE
from megatron_opd.methods.gates import EndGate, FinishedGate
from megatron_opd.methods.groups import group_advantages
from megatron_opd.methods.method import MethodConfig
from megatron_opd.methods.needs import fit_topk, needs_of
from megatron_opd.methods.ratios import ClippedRatio
from megatron_opd.methods.terms import CrossEntropyTerm, PolicyGradientTerm
from megatron_opd.metrics.run_directory import sample_line
from megatron_opd.metrics.sinks import Sinks
from megatron_opd.metrics.summary import summarise
from megatron_opd.objective.batch import Batch
from megatron_opd.objective.columns import build_columns
from megatron_opd.objective.loss import Objective, finish
from megatron_opd.recipe.keys import LogConfig
from megatron_opd.report.page import write_report
from megatron_opd.trainer.step import shares_of_groups
from tests.rows import row
from tests.scripted import MOST_TURNS, SEED, STEP, rows_of_episodes
from tests.tiny_config import tiny_config
from tests.unit.categorical import OnLogits

V, K = 11, 4
KINDS = ("window", "growing")
UPDATE = {"train/loss": 0.0, "train/skipped_updates": 0.0}
S, E = Source.STUDENT, Source.ENVIRONMENT


def of_sources(*sources: Source, **keys) -> Row:
    return replace(row([7] * len(sources)), sources=np.array(sources, np.int8), **keys)


# ----------------------------------------------------------------------------------------- the rows
def test_turns_end_where_the_environment_answers() -> None:
    talk = of_sources(S, S, E, E, S, E, S, S, turn=2, cut_turns=(3,))
    assert talk.turn_T.tolist() == [2, 2, 2, 2, 3, 3, 4, 4]
    assert talk.finished_T.tolist() == [True] * 4 + [False] * 2 + [True] * 2
    assert np.flatnonzero(talk.end_T).tolist() == [1, 7]
    assert talk.num_written == 5 and talk.truncated
    cut = replace(talk, finish_reason="length", cut_turns=())
    assert np.flatnonzero(cut.end_T).tolist() == [1, 4]
    heard = of_sources(S, E, E)  # the environment has the last word
    assert heard.turn_T.tolist() == [0, 0, 0] and np.flatnonzero(heard.end_T).tolist() == [0]
    assert not len(of_sources().turn_T) and not len(of_sources().end_T)


def test_a_penalty_is_of_its_row_alone() -> None:
    rows = [r for r in rows_of_episodes("window", V) if r.sample == 0 and r.group == 0]
    assert len(rows) > 1 and len(episodes_of(rows)) == 1
    assert [r.episode.reward - r.reward for r in rows] == [0.25 * (r.turn == 1) for r in rows]


def test_scripted_episodes_have_what_the_tests_below_need() -> None:
    window, growing = (rows_of_episodes(kind, V) for kind in ("window", "growing"))
    turns = {r.episode.turns for r in growing}
    assert {1, MOST_TURNS} <= turns and {e.reward for e in episodes_of(growing)} == {0.0, 1.0}
    assert len(window) == sum(r.episode.turns for r in growing) and len(growing) == 12
    assert any(r.cut_turns for r in growing) and any(r.finish_reason == "stop" for r in growing)
    spoken = [np.concatenate([r.prompt_ids, r.token_ids]) for r in growing]
    last = [r for r in window if r.turn == r.episode.turns - 1]
    for ours, theirs in zip(spoken, last, strict=True):
        assert ours.tolist() == [*theirs.prompt_ids, *theirs.token_ids]


def test_a_gate_draws_the_same_for_a_turn_in_both_kinds_of_rows() -> None:
    batches = [Batch(rows_of_episodes(kind, V), Signals(), SEED, STEP, 20) for kind in KINDS]
    drawn = [batch.uniform_T[batch.written_T] for batch in batches]
    assert torch.equal(*drawn) and len(drawn[0].unique()) == len(drawn[0])


def test_what_stands_before_a_token_is_without_the_environments_words() -> None:
    batch = Batch(rows_of_episodes("growing", V), Signals(), SEED, STEP, 20)
    places_T = batch.before(batch.zeros_T + 1)
    for number, r in enumerate(batch.rows):
        of_row_T = (batch.sequence_T == number) & batch.written_T
        assert places_T[of_row_T].tolist() == list(range(r.num_written))


# ------------------------------------------------------------- nobody counts what was not written
def batch_of(rows: list[Row], student_TV: torch.Tensor, teacher_TV: torch.Tensor) -> Batch:
    ids_T = torch.from_numpy(np.concatenate([r.token_ids for r in rows])).long()
    of_token = lambda log_p_TV: log_p_TV.gather(1, ids_T[:, None])[:, 0].float().numpy()  # noqa: E731
    entropy = lambda log_p_TV: -(log_p_TV.exp() * log_p_TV).sum(1).float().numpy()  # noqa: E731
    best = teacher_TV.topk(K)
    teacher = TeacherSignals(
        best.indices[:, 0].int().numpy(), of_token(teacher_TV), entropy(teacher_TV),
        best.indices.int().numpy(), best.values.float().numpy(),
    )  # fmt: skip
    student = StudentSignals(of_token(student_TV), entropy(student_TV))
    reference = of_token((student_TV + 0.5 * teacher_TV).log_softmax(1))
    process = of_token((student_TV - 0.5 * teacher_TV).log_softmax(1))
    return Batch(rows, Signals(teacher, reference, student, process), SEED, STEP, 20)


def distributions(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of a student and a teacher, float64 [T, V]."""
    draws = torch.Generator().manual_seed(1)
    normal = lambda: torch.randn(tokens, V, generator=draws, dtype=torch.float64)  # noqa: E731
    return normal().log_softmax(1), normal().log_softmax(1)


def written_alone(r: Row) -> Row:
    """The row without a word of the environment's."""
    kept = {
        name: getattr(r, name)[r.written_T]
        for name in ("token_ids", "sources", "logprobs", "versions")
    }
    return replace(r, **kept)


def loss_of(method: MethodConfig, batch: Batch, student_TV: torch.Tensor, teacher_TV: torch.Tensor):
    """(loss, its gradient by the logits, metrics)."""
    logits_TV = student_TV.clone().requires_grad_()
    columns = build_columns(method, batch)
    loss, sums = Objective(method, V, 1.0)(
        OnLogits(logits_TV), columns, STEP, lambda: OnLogits(teacher_TV)
    )
    (gradient_TV,) = torch.autograd.grad(loss, logits_TV)
    return loss.detach(), gradient_TV, finish({name: float(v) for name, v in sums.items()})


@pytest.mark.parametrize("name", CATALOGUE)
def test_no_method_counts_the_words_of_an_environment(name: str) -> None:
    """Loss, gradient and metrics are those of the same rows without them."""
    method = fit_topk(CATALOGUE[name].method, K)
    rows = rows_of_episodes("growing", V)
    if not needs_of(method).rollouts:
        rows = [begun_with_trace(r, r.num_tokens) for r in rows]
    student_TV, teacher_TV = distributions(sum(r.num_tokens for r in rows))
    talk = batch_of(rows, student_TV, teacher_TV)
    written_T = talk.written_T
    assert 0 < (~written_T).sum() < len(written_T) / 2
    alone = batch_of([written_alone(r) for r in rows], student_TV[written_T], teacher_TV[written_T])
    # without the environment a row has one turn
    for field in ("uniform_T", "end_T", "finished_T"):
        vars(alone)[field] = getattr(talk, field)[written_T]
    loss, gradient_TV, metrics = loss_of(method, talk, student_TV, teacher_TV)
    want, want_TV, want_metrics = loss_of(
        method, alone, student_TV[written_T], teacher_TV[written_T]
    )
    assert (gradient_TV[~written_T] == 0).all() and (gradient_TV != 0).any()
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient_TV[written_T], want_TV, rtol=1e-5, atol=1e-8)
    assert metrics == pytest.approx(want_metrics, rel=1e-5, abs=1e-6)


# ------------------------------------------------------------------------------ a dense reference
# Everything that reads the end of a row, its length or its sums.
METHOD = MethodConfig(
    "talk",
    {
        "policy": PolicyGradientTerm(
            "policy_gradient",
            advantages={
                "reward": RewardAdvantage("reward", overlong=0.5, over="rows"),
                "teacher": LogRatioAdvantage(
                    "log_ratio", 0.3, anchor="old", discount=0.9, mean_to_go=True
                ),
            },
            ratio=ClippedRatio("sequence", 0.2, 0.2),
            gates={"finished": FinishedGate("finished")},
            aggregate="seq-mean-token-mean",
        ),
        "guidance": CrossEntropyTerm(
            "cross_entropy", "teacher_argmax", 0.7, gates={"body": EndGate("not_end")},
            denominator="all",
        ),
    },
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_those_of_loops_in_float64(kind: str) -> None:
    rows = rows_of_episodes(kind, V)
    student_TV, teacher_TV = distributions(sum(r.num_tokens for r in rows))
    batch = batch_of(rows, student_TV, teacher_TV)
    loss, gradient_TV, _ = loss_of(METHOD, batch, student_TV, teacher_TV)
    logits_TV = student_TV.clone().requires_grad_()
    want = by_loops(rows, logits_TV, student_TV, teacher_TV)
    (want_TV,) = torch.autograd.grad(want, logits_TV)
    torch.testing.assert_close(loss.double(), want.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient_TV, want_TV, rtol=1e-4, atol=1e-7)


def by_loops(rows, logits_TV, old_TV, teacher_TV):
    """METHOD, token by token; the longest completion has 20 tokens."""
    log_p_TV = logits_TV.log_softmax(1)
    written = [sum(source != E for source in r.sources) for r in rows]
    rewards = [
        r.reward - min(max((n - 10) / 10, 0.0), 1.0) for r, n in zip(rows, written, strict=True)
    ]
    total, start = torch.zeros((), dtype=torch.float64), 0
    for r, reward in zip(rows, rewards, strict=True):
        group = [x for x, other in zip(rewards, rows, strict=True) if other.group == r.group]
        outcome = (reward - np.mean(group)) / (np.std(group, ddof=1) + 1e-6)
        ids = [(start + t, int(i)) for t, i in enumerate(r.token_ids)]
        sampled = [t for t in range(r.num_tokens) if r.sources[t] != E]
        deltas = [float(teacher_TV[ids[t]] - old_TV[ids[t]]) for t in sampled]
        turn = r.turn
        for n, t in enumerate(sampled):
            if t and r.sources[t - 1] == E:
                turn += 1
            is_last = t + 1 == r.num_tokens
            cut = turn in r.cut_turns
            if turn == r.turn + turns_within(r) - 1 and r.finish_reason == "length":
                cut = True
            to_go = sum(0.9**m * d for m, d in enumerate(deltas[n:])) / len(deltas[n:])
            ratio = (log_p_TV[ids[t]] - log_p_TV[ids[t]].detach()).exp()  # on policy: of value 1
            if not cut:
                total -= ratio * (outcome + 0.3 * to_go) / len(sampled) / len(rows)
            if cut or not (is_last or r.sources[t + 1] == E):
                best = int(teacher_TV[start + t].argmax())
                total -= 0.7 * log_p_TV[start + t, best] / sum(written)
        start += r.num_tokens
    return total


def turns_within(r: Row) -> int:
    pairs = zip(r.sources[:-1], r.sources[1:], strict=True)
    return 1 + sum(a == E and b != E for a, b in pairs)


@pytest.mark.parametrize("normalise", ["std", "mean", "leave_one_out"])
def test_a_group_is_of_attempts_or_of_rows(normalise: str) -> None:
    rows = rows_of_episodes("window", V)
    batch = Batch(rows, Signals(), SEED, STEP, 20)
    values = {
        over: RewardAdvantage("reward", normalise=normalise, over=over).value(batch)
        for over in ("episodes", "rows")
    }
    start = 0
    for r in rows:
        group = [x for x in rows if x.group == r.group]
        attempts = {}
        for x in group:
            attempts.setdefault(x.sample, []).append(x.reward)
        of = {
            "episodes": {sample: np.mean(each) for sample, each in attempts.items()},
            "rows": {(x.sample, x.turn): x.reward for x in group},
        }
        for over, rewards in of.items():
            own = r.sample if over == "episodes" else (r.sample, r.turn)
            members = list(rewards.values())
            others = [reward for member, reward in rewards.items() if member != own]
            want = r.reward - np.mean(others if normalise == "leave_one_out" else members)
            if normalise == "std" and over == "episodes":
                # every episode counts once, each of its rows a fraction of it
                squares = [(x.reward - np.mean(members)) ** 2 / x.episode.turns for x in group]
                want /= np.sqrt(sum(squares) / (len(members) - 1)) + 1e-6
            elif normalise == "std":
                want /= np.std(members, ddof=1) + 1e-6
            assert values[over][start] == pytest.approx(want, abs=1e-9), (over, r.group)
        start += r.num_tokens
    assert not torch.equal(*values.values())
    growing = Batch(rows_of_episodes("growing", V), Signals(), SEED, STEP, 20)
    both = [RewardAdvantage("reward", over=over).value(growing) for over in values]
    assert torch.equal(*both), "one row an attempt: no difference, to the bit"


def test_a_penalty_in_a_group_of_equal_episodes_is_no_explosion() -> None:
    """Both episodes lose, and each has one invalid action: their means are equal."""
    rewards = np.array([-0.1, 0.0, 0.0, 0.0, -0.1, 0.0])
    of_rows = group_advantages(rewards, np.zeros(6), "std", 1e-6)
    episodes = np.array([0, 0, 0, 1, 1, 1])
    of_episodes = group_advantages(rewards, np.zeros(6), "std", 1e-6, episodes)
    assert np.abs(of_rows).max() < 2 and np.abs(of_episodes).max() < 2
    assert of_episodes.sum() == pytest.approx(0)


# ------------------------------------------------------------------------- a step and its records
def test_an_update_has_whole_groups_however_many_rows_they_have() -> None:
    rows = rows_of_episodes("window", V)
    shares = shares_of_groups(rows, 3)
    assert [row for share in shares for row in rows[share]] == rows
    groups = [{r.group for r in rows[share]} for share in shares]
    assert groups == [{0}, {1}, {2, 3}]


def test_metrics_are_of_episodes_and_of_what_was_written() -> None:
    window, growing = (rows_of_episodes(kind, V) for kind in KINDS)
    of_window, of_growing = (summarise([UPDATE], rows, None, {}) for rows in (window, growing))
    for name in ("reward/mean", "reward/uniform_groups/mean", "reward/reason/won"):
        assert of_window[name] == of_growing[name], name
    assert of_growing["reward/reason/won"] + of_growing["reward/reason/lost"] == 12
    tokens = sum(r.num_tokens for r in window)
    assert of_window["rollout/completion_tokens/mean"] == pytest.approx(tokens / len(window))
    assert of_growing["rollout/completion_tokens/mean"] == pytest.approx(tokens / len(growing))
    assert of_growing["rollout/policy_version"] == STEP


def test_the_lines_of_a_run_say_who_wrote_what_where_it_differs() -> None:
    (single,) = [r for r in rows_of_episodes("growing", V) if r.episode.turns == 1][:1]
    assert not {"turn", "turns", "penalty", "sources"} & sample_line(0, single, None).keys()
    growing = next(r for r in rows_of_episodes("growing", V) if r.episode.turns > 1)
    line = sample_line(0, growing, None)
    assert line["sources"] == growing.sources.tolist() and line["turns"] == growing.episode.turns
    window = next(r for r in rows_of_episodes("window", V) if r.turn == 1)
    line = sample_line(0, window, None)
    assert (line["turn"], line["penalty"]) == (1, 0.25) and "sources" not in line


def test_only_tokens_of_the_sampler_are_compared_with_it() -> None:
    """Not those of a trace, of the teacher, of an environment, or of an off-policy step."""
    drawn = of_sources(S, Source.TEACHER, E, S, Source.TRACE)
    drawn = replace(drawn, versions=np.array([2, 2, -1, 2, -1], np.int32))
    batch = Batch([drawn, row([1, 2], given=2).as_if_sampled()], Signals(), 0, 0, 20)
    assert batch.drawn_T.tolist() == [True, False, False, True, False, False, False]
    assert batch.sampled_T.tolist() == [True, True, False, True, False, True, True]


def test_the_report_shows_an_environments_words_as_such(tmp_path: Path) -> None:
    rows = [r for r in rows_of_episodes("growing", V) if r.episode.turns > 1]
    config = tiny_config(log=LogConfig(tensorboard=False))
    with Sinks(tmp_path, config) as sinks:
        sinks.log(StepRecord(0, {}, rows[:1]))
    page = write_report(tmp_path).read_text()
    assert page.count('data-tip="written by the environment"') == (~rows[0].written_T).sum()
