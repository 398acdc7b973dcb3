"""The catalogue: a name, the paper it comes from, and the terms of its loss.

`method: NAME` in a recipe takes an entry as it is; `method: {name: NAME, <term>: {<key>: ...}}` changes keys of it.
Formulas: docs/methods.md.
"""

from dataclasses import dataclass

from megatron_opd.config.schema import CrossEntropyTerm, LinearDecay, MethodConfig, PolicyGradientTerm

_grpo = PolicyGradientTerm(kind="policy_gradient")


def _guidance(weight: float | LinearDecay) -> CrossEntropyTerm:
    # TGPO Eq. 3 prints 1/|y| per sequence inside an expectation: the literal reading is the default here.
    return CrossEntropyTerm(
        kind="cross_entropy", targets="teacher_argmax", weight=weight, aggregate="seq-mean-token-mean"
    )


@dataclass(frozen=True)
class CatalogueEntry:
    method: MethodConfig
    summary: str
    source: str


_entries = (
    CatalogueEntry(
        MethodConfig("sft", {"trace": CrossEntropyTerm(kind="cross_entropy", targets="trace")}),
        "negative log-likelihood of the data set's own responses, token-mean",
        "arXiv 2605.13230, baseline",
    ),
    CatalogueEntry(
        MethodConfig("grpo", {"policy": PolicyGradientTerm(kind="policy_gradient", aggregate="seq-mean-token-mean")}),
        "group-normalised rewards, clipped ratio, mean per sequence, no reference KL",
        "arXiv 2402.03300, Eq. 3 without its KL term",
    ),
    CatalogueEntry(
        MethodConfig("grpo++", {"policy": _grpo}),
        "GRPO without KL, averaged over tokens",
        "arXiv 2605.13230, Eq. 4",
    ),
    CatalogueEntry(
        MethodConfig("tgpo", {"policy": _grpo, "guidance": _guidance(2e-3)}),
        "GRPO++ plus a constant weight times the negative log-likelihood of the teacher's argmax token",
        "arXiv 2605.13230, Eq. 6 (its sign corrected)",
    ),
    CatalogueEntry(
        MethodConfig("tgpo_annealing", {"policy": _grpo, "guidance": _guidance(LinearDecay(start=2e-3, decay=1e-5))}),
        "TGPO whose guidance weight falls linearly to 0 (at step 200 with the paper's numbers)",
        "arXiv 2605.13230, Eq. 6 and section 4",
    ),
)

CATALOGUE: dict[str, CatalogueEntry] = {entry.method.name: entry for entry in _entries}
