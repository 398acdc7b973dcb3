"""What a method asks of the stations, derived from its terms. There are no flags to forget."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from megatron_opd.methods.advantages import (
    Advantage,
    LogRatioAdvantage,
    LogRatioFactor,
    ProcessRewardAdvantage,
    RewardAdvantage,
    ShapingAdvantage,
    TopKAdvantage,
)
from megatron_opd.methods.corrections import Correction
from megatron_opd.methods.gates import (
    EntropyGate,
    EntropyQuantileGate,
    Gate,
    LogRatioGate,
    ProbabilityGapGate,
    SigmoidGate,
    TrustGate,
    WrongGate,
)
from megatron_opd.methods.ratios import ShapedProbability, TeacherRatio
from megatron_opd.methods.schedules import CosineDecay, LinearDecay, Switch, Weight
from megatron_opd.methods.terms import (
    CrossEntropyTerm,
    DivergenceTerm,
    EntropyTerm,
    MethodConfig,
    PolicyGradientTerm,
    Term,
    TopKTerm,
)

_OF_TEACHER_AND_STUDENT = (LogRatioGate, ProbabilityGapGate, TrustGate)


@dataclass(frozen=True)
class Needs:
    """The signals that the terms of a method read."""

    rollouts: bool  # the student samples (otherwise the data set's traces are the text)
    traces: bool  # the data set's responses, alone or mixed with samples
    rewards: bool
    teacher: bool  # a forward pass of the teacher
    topk: int  # how many of the teacher's best ids
    teacher_head: bool  # the teacher's whole distribution, within the student's forward pass
    reference: bool  # the student as the run found it
    # a model trained beside the student, whose log-ratio to the reference is a reward
    process: bool
    student_pass: bool  # the student's logprobs and entropy before the first update of a step


def needs_of(method: MethodConfig, updates_per_step: int = 1) -> Needs:
    """With several updates per step the importance ratio needs the student as it was before the
    first of them."""
    terms, found = method.terms.values(), list(parts(method))
    topk = [each.k for each in found if isinstance(each, TopKTerm | TopKAdvantage)]
    process = process_reward(method) is not None
    return Needs(
        rollouts=not all(reads_traces(term) for term in terms),
        traces=any(reads_traces(term) for term in terms)
        or method.traces_per_group > 0
        or method.prefix is not None
        or method.on_policy_fraction < 1,
        rewards=process or any(isinstance(each, RewardAdvantage | WrongGate) for each in found),
        teacher=method.teacher_share > 0 or any(reads_teacher(each) for each in found),
        topk=max(topk, default=0),
        teacher_head=any(isinstance(each, DivergenceTerm) for each in found),
        reference=process
        or any(isinstance(each, LogRatioAdvantage) and each.model == "reference" for each in found),
        process=process,
        student_pass=updates_per_step > 1
        or method.teacher_share > 0
        or any(_reads_student(each) for each in found),
    )


def parts(method: MethodConfig) -> Iterator[object]:
    """The terms, and everything they are made of that may read a signal."""
    for term in method.terms.values():
        yield term
        yield from gates_of(term).values()
        yield from advantages_of(term).values()
        if isinstance(term, PolicyGradientTerm):
            yield term.ratio
        if not isinstance(term, DivergenceTerm | EntropyTerm) and term.correction:
            yield term.correction


def gates_of(term: Term) -> dict[str, Gate]:
    return {} if isinstance(term, EntropyTerm) else term.gates


def advantages_of(term: Term) -> dict[str, Advantage]:
    return term.advantages if isinstance(term, PolicyGradientTerm) else {}


def process_reward(method: MethodConfig) -> ProcessRewardAdvantage | None:
    """The advantage that has a model trained for it; a method has at most one."""
    return next((part for part in parts(method) if isinstance(part, ProcessRewardAdvantage)), None)


def active(method: MethodConfig, step: int) -> MethodConfig:
    """The method without what has a weight of 0 at `step`: signals that only it reads need not be
    made."""
    terms: dict[str, Term] = {}
    for name, term in method.terms.items():
        if weight_at(term.weight, step) > 0:
            terms[name] = term
            if isinstance(term, PolicyGradientTerm):
                left = {
                    key: each
                    for key, each in term.advantages.items()
                    if weight_at(each.weight, step) > 0
                }
                terms[name] = replace(term, advantages=left)
    return replace(method, terms=terms)


def is_on_policy(method: MethodConfig, seed: int, step: int) -> bool:
    """Whether the student samples at `step`: with probability `on_policy_fraction`, drawn from
    (seed, step) alone."""
    return random.Random(f"{seed} {step} on policy").random() < method.on_policy_fraction


def fit_topk(method: MethodConfig, vocab_size: int) -> MethodConfig:
    """The method with every k at most the vocabulary: a paper's top 64 of fewer tokens is all of
    them."""

    def fit(each: Any) -> Any:
        return (
            replace(each, k=min(each.k, vocab_size))
            if isinstance(each, TopKTerm | TopKAdvantage)
            else each
        )

    terms = {name: fit(term) for name, term in method.terms.items()}
    for name, term in terms.items():
        if isinstance(term, PolicyGradientTerm):
            terms[name] = replace(
                term, advantages={key: fit(each) for key, each in term.advantages.items()}
            )
    return replace(method, terms=terms)


def reads_traces(term: Term) -> bool:
    """Whether a term is of tokens that the student did not sample: of traces, and of prefixes."""
    if isinstance(term, PolicyGradientTerm):
        return isinstance(term.ratio, ShapedProbability)
    return isinstance(term, CrossEntropyTerm) and term.targets == "trace"


def of_sequence(part: object) -> TypeGuard[LogRatioAdvantage]:
    """Whether a log-ratio of a token depends on the tokens after it: it is computed once, before
    the update."""
    return isinstance(part, LogRatioAdvantage) and part.discount > 0


def reads_teacher(part: object) -> bool:
    """Whether a part needs a forward pass of the teacher over the text."""
    if isinstance(part, LogRatioAdvantage):
        return part.model == "teacher"
    if isinstance(part, EntropyGate):
        return part.model == "teacher"
    if isinstance(part, SigmoidGate):
        return part.signal == "log_ratio"
    if isinstance(part, CrossEntropyTerm):
        return part.targets == "teacher_argmax"
    always = (ShapingAdvantage, TopKAdvantage, LogRatioFactor, TeacherRatio, TopKTerm)
    return isinstance(part, always + _OF_TEACHER_AND_STUDENT)


def _reads_student(part: object) -> bool:
    """Whether a part needs the student as it was before the first update of a step."""
    if isinstance(part, EntropyGate):
        return part.model == "student"
    if of_sequence(part):
        return part.anchor == "old"
    return isinstance(
        part, (EntropyQuantileGate, SigmoidGate, Correction, *_OF_TEACHER_AND_STUDENT)
    )


def weight_at(weight: Weight, step: int) -> float:
    """The weight of a term at `step` (counted from 0)."""
    if isinstance(weight, LinearDecay):
        return max(weight.start - weight.decay * step, weight.floor)
    if isinstance(weight, CosineDecay):
        return weight.end + (weight.start - weight.end) * cosine(step, weight.steps)
    if isinstance(weight, Switch):
        return weight.before if step < weight.at else weight.after
    return weight


def cosine(step: int, steps: int) -> float:
    """From 1 at step 0 to 0 at `steps` and later."""
    return 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps))
