"""Every part of every family does something, says what it reads, and a new one needs no more than
its class."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from megatron_opd.contracts.signals import Signals, StudentSignals, TeacherSignals
from megatron_opd.errors import ConfigError
from megatron_opd.methods import advantages, corrections, gates, ratios, schedules, terms
from megatron_opd.methods.catalogue import CATALOGUE
from megatron_opd.methods.method import MethodConfig
from megatron_opd.methods.needs import distances_of, needs_of, parts
from megatron_opd.methods.part import (
    AdvantagePart,
    Around,
    CorrectionPart,
    GatePart,
    Needs,
    Part,
    RatioPart,
    TermPart,
)
from megatron_opd.methods.schedules import Schedule
from megatron_opd.methods.tokens import Tokens
from megatron_opd.objective.batch import Batch
from megatron_opd.objective.columns import build_columns
from megatron_opd.objective.loss import Objective
from megatron_opd.recipe.load import dump_config, load_config
from tests.rows import row, task
from tests.unit.categorical import OnLogits

V, K, LONGEST = 9, 3, 6
MATH, CODE = task(0, source="math"), task(1, source="code")
ROWS = [
    row([1, 2, 3], of=MATH, group=0, reward=1.0),
    row([4, 5, 6, 7, 8, 1], of=MATH, group=0, sample=1, finish_reason="length"),
    row([3, 3], of=MATH, group=0, sample=2, given=2, reward=1.0),
    row([2, 8, 5, 6], of=CODE, group=1, given=1),
    row([7, 1], of=CODE, group=1, sample=1),
    row([6, 4, 2], of=CODE, group=1, sample=2, finish_reason="length"),
]
T = sum(r.num_tokens for r in ROWS)
_generator = torch.Generator().manual_seed(0)
IDS_T = torch.from_numpy(np.concatenate([r.token_ids for r in ROWS])).long()
_logits_MTV = torch.randn(5, T, V, generator=_generator)
_logits_MTV[1, ::3] += 3 * torch.nn.functional.one_hot(IDS_T[::3], V)  # some tokens are its best
OLD_TV, TEACHER_TV, REFERENCE_TV, PROCESS_TV, SAMPLER_TV = _logits_MTV.log_softmax(2)
NEW_TV = OLD_TV + 0.4 * torch.randn(T, V, generator=_generator)
AROUND = Around(
    num_steps=100, group_size=3, traces_per_group=1, updates_per_step=2, pipeline_stages=1,
    student_tp=1, teacher_tp=1,
)  # fmt: skip


def of_ids(log_p_TV: torch.Tensor) -> np.ndarray:
    return log_p_TV.gather(1, IDS_T[:, None])[:, 0].numpy()


def entropy(log_p_TV: torch.Tensor) -> np.ndarray:
    return -(log_p_TV.exp() * log_p_TV).sum(1).numpy()


def signals_for(needs: Needs) -> Signals:
    """No more than what `needs` names."""
    best = TEACHER_TV.topk(max(needs.topk, 1))
    teacher = TeacherSignals(
        TEACHER_TV.argmax(1).int().numpy(),
        of_ids(TEACHER_TV),
        entropy(TEACHER_TV),
        best.indices.int().numpy() if needs.topk else None,
        best.values.numpy() if needs.topk else None,
    )
    return Signals(
        teacher if needs.teacher else None,
        of_ids(REFERENCE_TV) if needs.reference else None,
        StudentSignals(of_ids(OLD_TV), entropy(OLD_TV)) if needs.student_pass else None,
        of_ids(PROCESS_TV) if needs.process else None,
    )


def loss_and_gradient(
    method: MethodConfig, needs: Needs | None = None, step: int = 0
) -> tuple[float, torch.Tensor]:
    """With the signals that the method, or `needs`, names and no others."""
    needs = needs or needs_of(method, updates_per_step=2)
    ends = np.cumsum([0] + [r.num_tokens for r in ROWS])
    sampler_T = of_ids(SAMPLER_TV)
    rows = [
        replace(r, logprobs=sampler_T[a:b]) for r, a, b in zip(ROWS, ends, ends[1:], strict=False)
    ]
    batch = Batch(rows, signals_for(needs), 0, step, LONGEST)
    columns = build_columns(method, batch)
    logits_TV = NEW_TV.clone().requires_grad_()
    loss, _ = Objective(method, V, 1.0)(
        OnLogits(logits_TV),
        columns,
        step,
        (lambda: OnLogits(TEACHER_TV)) if needs.teacher_head else None,
    )
    (gradient,) = torch.autograd.grad(loss, logits_TV)
    return loss.item(), gradient


PLAIN = terms.PolicyGradientTerm("policy_gradient")
TRACE = terms.CrossEntropyTerm("cross_entropy", "trace")
ADVANTAGES: list[AdvantagePart] = [
    advantages.RewardAdvantage("reward", normalise="mean", overlong=0.5),
    advantages.LogRatioAdvantage("log_ratio"),
    advantages.LogRatioAdvantage("log_ratio", model="reference", transform="expm1", k3_limit=0.1),
    advantages.LogRatioAdvantage("log_ratio", transform="mixture", mix=0.5, anchor="rollout"),
    advantages.LogRatioAdvantage("log_ratio", transform="floor", mix=0.3, anchor="old"),
    advantages.LogRatioAdvantage("log_ratio", anchor="old", discount=0.9, mean_to_go=True),
    advantages.LogRatioAdvantage("log_ratio", weight=-0.5),
    advantages.ShapingAdvantage("shaping", "argmax_logprob"),
    advantages.ShapingAdvantage("shaping", "argmax_indicator"),
    advantages.ShapingAdvantage("shaping", "teacher_logprob"),
    advantages.TopKAdvantage("topk_kl", K),
    advantages.ProcessRewardAdvantage("process_reward"),
    advantages.LogRatioFactor("log_ratio_factor"),
    advantages.ConstantAdvantage("constant", weight=-0.5),
    advantages.EntropyAdvantage("entropy"),
    advantages.StateAdvantage("state_kl"),
    advantages.ProximalReturnAdvantage("proximal_return"),
]
GATES: list[GatePart] = [
    gates.EntropyQuantileGate("entropy_quantile", 0.5),
    gates.LogprobQuantileGate("logprob_quantile", 0.5),
    gates.EntropyGate("entropy", above=float(np.median(entropy(TEACHER_TV)))),
    gates.EntropyGate("entropy", above=1.5, model="student", invert=True),
    gates.LogRatioGate("log_ratio", at_least=0.0),
    gates.ProbabilityGapGate("probability_gap"),
    gates.TrustGate("trust"),
    gates.TrustGate("trust", expected=True, invert=True),
    gates.SigmoidGate("sigmoid"),
    gates.SigmoidGate("sigmoid", anchor="current"),
    gates.SigmoidGate("sigmoid", 0.5, "student_entropy", "current"),
    gates.SigmoidGate("sigmoid", 0.5, "soft_or"),
    gates.WrongGate("wrong", invert=True),
    gates.WrongGate("wrong", "group"),
    gates.EndGate("not_end"),
    gates.FinishedGate("finished"),
    gates.DriftGate("drift"),
    gates.TurnBalanceGate("turn_balance", by_token=0.25),
    gates.SourceSpreadGate("source_spread", low=0.01, high=100.0),
]
RATIOS: list[RatioPart] = [
    ratios.ClippedRatio("old", 0.01, 0.01, 1.5),
    ratios.ClippedRatio("rollout"),
    ratios.ClippedRatio("sequence", 0.01, 0.01),
    ratios.DetachedRatio("detached", clip_high=0.1),
    ratios.TeacherRatio("teacher_mixture"),
    ratios.ShapedProbability("shaped"),
    ratios.NoRatio("none"),
    ratios.TeacherEstimate("teacher_gap"),
    ratios.TeacherEstimate("teacher_k3"),
]
CORRECTIONS: list[CorrectionPart] = [
    corrections.Correction("truncated", 0.8),
    corrections.Correction("masked", 1.5, 0.5),
    corrections.Correction("sequence_truncated", 0.8),
    corrections.Correction("sequence_masked", 1.5, 0.5),
    corrections.Correction("geometric", 1.2, 0.9),
]
TERMS: list[TermPart] = [
    PLAIN,
    TRACE,
    terms.CrossEntropyTerm("cross_entropy", "teacher_argmax"),
    terms.TopKTerm("topk", K, tail="ghost"),
    terms.TopKTerm("topk", K, divergence="jsd_teacher_side", beta=0.5),
    terms.DivergenceTerm("divergence", "jsd", beta=0.5),
    terms.EntropyTerm("entropy"),
]
SCHEDULES: list[Schedule] = [
    schedules.LinearDecay(1.0, 0.25),
    schedules.CosineDecay("cosine", 1.0, 3, 0.5),
    schedules.Switch("switch", 1.0, 1, 0.5),
]
OTHER_RATIO = ratios.ClippedRatio("old", None, None)


def with_part(part: Part) -> tuple[MethodConfig, MethodConfig]:
    """A small method, and the same with the part."""
    base: TermPart = PLAIN
    changed: TermPart
    match part:
        case AdvantagePart():
            changed = replace(PLAIN, advantages={**PLAIN.advantages, "new": part})
        case GatePart():
            changed = replace(PLAIN, gates={"new": part})
        case CorrectionPart():
            changed = replace(PLAIN, correction=part)
        case RatioPart():
            base = replace(PLAIN, ratio=OTHER_RATIO)
            changed = replace(PLAIN, ratio=part)
        case TermPart():
            return method_of({"trace": TRACE}), method_of({"trace": TRACE, "new": part})
        case _:
            raise AssertionError(part)
    return method_of({"trace": TRACE, "t": base}), method_of({"trace": TRACE, "t": changed})


def method_of(of_terms: dict[str, TermPart]) -> MethodConfig:
    return MethodConfig("", of_terms, traces_per_group=1)


def name_of(part: object) -> str:
    usual = [f"{f.name}={getattr(part, f.name)}" for f in fields(part) if f.name != "weight"]
    return " ".join(usual)


PARTS: list[Part] = [*ADVANTAGES, *GATES, *RATIOS, *CORRECTIONS, *TERMS]


@pytest.mark.parametrize("part", PARTS, ids=name_of)
def test_a_part_changes_loss_and_gradient(part: Part) -> None:
    without, with_it = with_part(part)
    loss_before, gradient_before = loss_and_gradient(without)
    loss, gradient = loss_and_gradient(with_it)
    assert np.isfinite(loss) and gradient.isfinite().all()
    assert loss != pytest.approx(loss_before, abs=1e-7)
    assert (gradient - gradient_before).abs().max() > 1e-5


@pytest.mark.parametrize("part", PARTS, ids=name_of)
def test_a_part_passes_its_own_check_and_has_a_formula(part: Part) -> None:
    assert part.check("method.t", AROUND) == []
    assert part.formula and part.__doc__


# Fields of Needs that a batch can lack: the others are of the rows, always there.
ASKED = ("teacher", "reference", "process", "student_pass", "topk", "teacher_head")


@pytest.mark.parametrize("part", PARTS, ids=name_of)
def test_a_part_names_what_it_reads_and_no_more(part: Part) -> None:
    """The method above was given what its needs name; without any one of them it cannot go on."""
    _, method = with_part(part)
    needs = needs_of(method)
    loss_and_gradient(method, needs)
    for signal in ASKED:
        if getattr(needs, signal):
            less = replace(needs, **{signal: type(getattr(needs, signal))()})
            with pytest.raises(AssertionError, match="needs"):
                loss_and_gradient(method, less)


FAMILIES: list[tuple[Any, list[Any], type]] = [
    (advantages.Advantage, ADVANTAGES, AdvantagePart),
    (gates.Gate, GATES, GatePart),
    (ratios.Ratio, RATIOS, RatioPart),
    (corrections.Correction, CORRECTIONS, CorrectionPart),
    (terms.Term, TERMS, TermPart),
]


@pytest.mark.parametrize(("union", "examples", "base"), FAMILIES, ids=lambda item: str(item)[:20])
def test_every_member_of_a_union_is_tried_here_and_every_class_is_a_member(
    union: Any, examples: list[Any], base: type
) -> None:
    members = set(get_args(union)) or {union}
    assert {type(example) for example in examples} == members
    package = {kind for kind in base.__subclasses__() if kind.__module__.startswith("megatron_opd")}
    assert package == members
    assert not any(inspect.isabstract(member) for member in members)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name_of)
def test_a_schedule_changes_the_loss(schedule: Schedule) -> None:
    assert {type(each) for each in SCHEDULES} == set(Schedule.__subclasses__())
    method = method_of({"t": replace(PLAIN, weight=schedule)})
    first, _ = loss_and_gradient(method, step=0)
    later, _ = loss_and_gradient(method, step=2)
    assert later == pytest.approx(0.5 * first) or later == pytest.approx(0.625 * first)
    assert schedule.check("method.t.weight", 100) == []


# ---------------------------------------------------------------------------- a new part, whole
@dataclass(frozen=True)
class EveryOther(GatePart):
    """Every second token of the vocabulary's ids, as the teacher likes it."""

    kind: str = "every_other"
    strength: float = 2.0

    formula = "`strength e^T`"

    def needs(self) -> Needs:
        return Needs(teacher=True)

    def teaches(self) -> bool:
        return True

    def value(self, tokens: Tokens) -> torch.Tensor:
        return self.strength * tokens.logprob("teacher").exp()


@dataclass(frozen=True)
class MarginAdvantage(AdvantagePart):
    """How much better than the reference the student is at the token."""

    kind: str = "margin"
    weight: float = 1.0

    formula = "`sg[S - R]`"

    def needs(self) -> Needs:
        return Needs(reference=True)

    def when(self) -> Any:
        return "within"

    def value(self, tokens: Tokens) -> torch.Tensor:
        return -tokens.log_ratio("reference", "current")


def test_a_part_written_here_trains() -> None:
    """Nothing but the two classes above: their signals are asked for and their numbers are in the
    gradient."""
    term = replace(PLAIN, advantages={"new": MarginAdvantage()}, gates={"new": EveryOther()})
    method = method_of({"t": term})
    needs = needs_of(method)
    assert (needs.teacher, needs.reference, needs.rewards) == (True, True, False)
    assert [part.kind for part in parts(method) if isinstance(part, GatePart)] == ["every_other"]
    _, got = loss_and_gradient(method)
    leaf = NEW_TV.double().requires_grad_()
    student_T = leaf.log_softmax(1).gather(1, IDS_T[:, None])[:, 0]
    ratio_T = (student_T - torch.from_numpy(of_ids(OLD_TV))).exp()
    advantage_T = (student_T - torch.from_numpy(of_ids(REFERENCE_TV))).detach()
    sampled_T = torch.from_numpy(np.concatenate([r.sources < 2 for r in ROWS]))
    gate_T = 2.0 * torch.from_numpy(of_ids(TEACHER_TV)).exp() * sampled_T
    surrogate_T = torch.minimum(ratio_T * advantage_T, ratio_T.clamp(0.8, 1.2) * advantage_T)
    (want,) = torch.autograd.grad(-(gate_T * surrogate_T).sum() / sampled_T.sum(), leaf)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)


def test_a_part_that_computes_nothing_is_no_part() -> None:
    class Empty(GatePart):
        formula = ""

    with pytest.raises(TypeError, match="abstract"):
        Empty()


@dataclass(frozen=True)
class Confused(AdvantagePart):
    """Asks for rewards within the update."""

    kind: str = "confused"
    weight: float = 1.0

    formula = ""

    def when(self) -> Any:
        return "within"

    def value(self, tokens: Tokens) -> torch.Tensor:
        return tokens.spread(tokens.rewards_N)


def test_a_part_that_mistakes_its_moment_is_told_so() -> None:
    wrong = method_of({"t": replace(PLAIN, advantages={"new": Confused()})})
    with pytest.raises(AssertionError, match="rewards_N is known before the update alone"):
        loss_and_gradient(wrong)


# ------------------------------------------------------------------------------ what is refused
ENTROPY = advantages.EntropyAdvantage("entropy")
WITHIN = gates.SigmoidGate("sigmoid", anchor="current")


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (replace(PLAIN, advantages={"e": ENTROPY}), "the expected gradient is 0"),
        (replace(PLAIN, gates={"s": WITHIN}, denominator="gated"), "must be known before it"),
        (replace(PLAIN, whiten=True, advantages={"l": ADVANTAGES[1]}), "changes within the update"),
    ],
)
def test_what_has_no_effect_or_cannot_be_is_refused(term: TermPart, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        term.check("method.t", AROUND)


def test_what_compares_whole_vocabularies_is_refused_where_they_are_split() -> None:
    for layout in ({"pipeline_stages": 2}, {"teacher_tp": 2}):
        with pytest.raises(ConfigError, match="whole distributions"):
            advantages.StateAdvantage("state_kl").check("method.t", replace(AROUND, **layout))


def test_distances_vanish_for_a_teacher_that_is_the_student() -> None:
    """Of every method that has some, but for total variation."""
    named = {name for name, entry in CATALOGUE.items() if distances_of(entry.method, V)}
    assert {"opd", "tropd", "gkd", "minillm", "kdrl"} <= named and "grpo" not in named


# ------------------------------------------------------------------ a user's own, in a recipe
OWN = '''
from dataclasses import dataclass

from megatron_opd.methods.part import GatePart


@dataclass(frozen=True)
class FirstTokens(GatePart):
    """The first tokens of a row."""

    kind: str
    count: int = 4

    formula = "`1[place < count]`"

    def value(self, tokens):
        ones_T = tokens.zeros_T + 1
        return tokens.before(ones_T) < self.count


@dataclass(frozen=True)
class Unfinished(GatePart):
    kind: str


class NoPart:
    pass
'''


@pytest.fixture
def own_parts(own_module: Callable[[str, str], Path]) -> Path:
    return own_module("own_parts", OWN)


def test_a_class_of_ones_own_is_a_kind_of_a_recipe(own_parts: Path) -> None:
    key = "method.policy.gates.first"
    config = load_config("demo", [f"{key}={{kind: 'own_parts:FirstTokens', count: 2}}"])
    gate = config.method.terms["policy"].gates["first"]
    assert (type(gate).__name__, gate.count) == ("FirstTokens", 2)
    (own_parts / "again.yaml").write_text(dump_config(config))
    assert load_config(str(own_parts / "again.yaml")) == config
    loss, _ = loss_and_gradient(method_of({"t": replace(PLAIN, gates={"first": gate})}))
    assert loss != pytest.approx(loss_and_gradient(method_of({"t": PLAIN}))[0])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nowhere:Gate", "nowhere cannot be imported"),
        ("own_parts:Missing", "own_parts has no Missing"),
        ("own_parts:NoPart", "must name a dataclass below megatron_opd.methods.part.GatePart"),
        ("own_parts:Unfinished", "does not define value"),
    ],
)
def test_what_is_no_part_is_one_line(own_parts: Path, kind: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        load_config("demo", [f"method.policy.gates.g={{kind: '{kind}'}}"])
    assert "method.policy.gates.g" in str(raised.value) and "\n" not in str(raised.value)
