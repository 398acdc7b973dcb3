"""The signals that a method asks of the stations, derived from its parts: no flags to forget."""

import random
from collections.abc import Iterator
from dataclasses import replace
from functools import reduce
from operator import or_

from megatron_opd.methods.advantages import ProcessRewardAdvantage
from megatron_opd.methods.method import MethodConfig
from megatron_opd.methods.part import Needs, Part, parts_of
from megatron_opd.methods.schedules import weight_at


def needs_of(method: MethodConfig, updates_per_step: int = 1) -> Needs:
    """The signals that the parts of a method read together, and the method itself.

    With several updates per step the importance ratio needs the student as it was before the first
    of them; so do tokens of a mixture, which count by what both models give them.
    """
    own = Needs(
        traces=method.traces_per_group > 0
        or method.prefix is not None
        or method.on_policy_fraction < 1,
        teacher=method.teacher_share > 0,
        student_pass=updates_per_step > 1 or method.teacher_share > 0,
    )
    return reduce(or_, (part.needs() for part in parts(method)), own)


def parts(method: MethodConfig) -> Iterator[Part]:
    """The terms, and everything they are made of."""
    for _, part in parts_of(method.terms):
        yield part


def process_reward(method: MethodConfig) -> ProcessRewardAdvantage | None:
    """The advantage that has a model trained for it; a method has at most one."""
    return next((part for part in parts(method) if isinstance(part, ProcessRewardAdvantage)), None)


def active(method: MethodConfig, step: int) -> MethodConfig:
    """The method without what has a weight of 0 at `step`: signals that only it reads need not be
    made."""
    terms = {
        name: term.at(step)
        for name, term in method.terms.items()
        if weight_at(term.weight, step) > 0
    }
    return replace(method, terms=terms)


def is_on_policy(method: MethodConfig, seed: int, step: int) -> bool:
    """True at a step where the student samples: with probability `on_policy_fraction`, drawn from
    (seed, step) alone."""
    return random.Random(f"{seed} {step} on policy").random() < method.on_policy_fraction


def fit_topk(method: MethodConfig, vocab_size: int) -> MethodConfig:
    """The method with every k at most the vocabulary: a paper's top 64 of fewer tokens is all of
    them."""
    terms = {name: term.fit(vocab_size) for name, term in method.terms.items()}
    return replace(method, terms=terms)


def distances_of(method: MethodConfig, vocab_size: int) -> MethodConfig | None:
    """The terms that are a distance from the teacher, at weight 1 on every token; None for none.

    They and their gradients are 0 where the teacher is the student. A cross-entropy with the
    teacher's token is no distance.
    """
    distances = {name: term.distance(vocab_size) for name, term in method.terms.items()}
    terms = {name: term for name, term in distances.items() if term is not None}
    return MethodConfig(f"{method.name}, its distances", terms) if terms else None
