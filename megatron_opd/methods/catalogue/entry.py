"""An entry of the catalogue."""

from dataclasses import dataclass

from megatron_opd.methods.method import MethodConfig, PrefixConfig
from megatron_opd.methods.terms import Term


@dataclass(frozen=True)
class CatalogueEntry:
    """A method, what it does in a line, and the paper it is from."""

    method: MethodConfig
    summary: str
    source: str
    left_open: str  # what the paper leaves open, and what is chosen here


def entry(
    *,
    name: str,
    summary: str,
    source: str,
    terms: dict[str, Term],
    left_open: str = "",
    traces_per_group: int = 0,
    prefix: PrefixConfig | None = None,
    on_policy_fraction: float = 1.0,
    teacher_share: float = 0.0,
    max_refills: int = 0,
) -> CatalogueEntry:
    """An entry, with the keys of its method beside what is said of it."""
    method = MethodConfig(
        name,
        terms,
        traces_per_group=traces_per_group,
        prefix=prefix,
        on_policy_fraction=on_policy_fraction,
        teacher_share=teacher_share,
        max_refills=max_refills,
    )
    return CatalogueEntry(method, summary, source, left_open)
