"""The terms of a method that are zero, with their gradient, where the teacher is the student."""

from dataclasses import replace

from megatron_opd.methods.advantages import Advantage, LogRatioAdvantage, TopKAdvantage
from megatron_opd.methods.terms import (
    DivergenceTerm,
    MethodConfig,
    PolicyGradientTerm,
    Term,
    TopKTerm,
)


def vanishing(method: MethodConfig, vocab_size: int) -> MethodConfig | None:
    """The terms that are a distance from the teacher, at weight 1 on every token; None for none.

    Top-k terms are taken on the whole vocabulary: on fewer ids their gradient is that of the mass
    the student leaves out. Total variation has no gradient at 0. A cross-entropy with the teacher's
    token is no distance.
    """
    terms: dict[str, Term] = {
        name: kept for name, term in method.terms.items() if (kept := _distance(term, vocab_size))
    }
    return MethodConfig(f"{method.name}, its distances", terms) if terms else None


def _distance(term: Term, vocab_size: int) -> Term | None:
    match term:
        case DivergenceTerm() if term.divergence != "tvd":
            return replace(term, weight=1.0, gates={})
        case TopKTerm():
            return replace(term, weight=1.0, gates={}, correction=None, k=vocab_size)
        case PolicyGradientTerm():
            advantages: dict[str, Advantage] = {
                name: replace(advantage, weight=1.0)
                for name, advantage in term.advantages.items()
                if isinstance(advantage, TopKAdvantage)
                or (isinstance(advantage, LogRatioAdvantage) and advantage.model == "teacher")
            }
            if advantages:
                # Divided by its deviation, an advantage of zeros would be noise.
                return replace(
                    term, weight=1.0, gates={}, correction=None, whiten=False, advantages=advantages
                )
    return None
