"""A method: the terms of the loss, and what the samples are mixed with. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_opd.contracts.ranges import Fraction, NonNegativeInt, PositiveInt, ProperFraction
from megatron_opd.methods.part import TermPart
from megatron_opd.methods.terms import Term

# A recipe's kinds are those of the union; a method made in Python takes any term.
if TYPE_CHECKING:
    Terms = Mapping[str, TermPart]
else:
    Terms = dict[str, Term]


@dataclass(frozen=True)
class PrefixConfig:
    """Responses that begin with the first tokens of the prompt's trace, TrOPD's off-policy
    guidance.

    At step k at most L(k) = max_completion_tokens (1 + cos(pi k / steps)) / 2 tokens, none from
    step `steps` on.
    """

    steps: PositiveInt  # the step from which on no response has a prefix
    # of the length: uniform on 0..L(k) | L(k), where the trace has as many
    law: Literal["uniform", "full"] = "uniform"


@dataclass(frozen=True)
class MethodConfig:
    """A name for the logs, the terms of the loss, and what the student's samples are mixed with."""

    name: str  # of the catalogue, or any other for a method in full: for the logs
    terms: Terms
    traces_per_group: NonNegativeInt = 0  # traces that join the samples of each prompt (LUFFY)
    # responses that begin with the start of a trace; null: none do
    prefix: PrefixConfig | None = None
    # of the steps; the others are on traces in the place of samples (GKD's lambda)
    on_policy_fraction: Fraction = 1.0
    teacher_share: ProperFraction = 0.0  # of the tokens, drawn from the teacher (MiniLLM's alpha)
    # times a step samples further prompts for groups of equal rewards (DAPO)
    max_refills: NonNegativeInt = 0
