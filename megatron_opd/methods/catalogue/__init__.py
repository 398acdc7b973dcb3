"""The catalogue: the methods of the literature by name, each with its paper and its loss.

`method: NAME` in a recipe takes an entry as it is; `method: {name: NAME, <term>: {<key>: ...}}`
changes keys of it. Formulas, and what the papers leave open: docs/methods.md.
"""

from megatron_opd.methods.catalogue import agents, divergences, log_ratios, rewards, tgpo, tropd
from megatron_opd.methods.catalogue.entry import CatalogueEntry

CATALOGUE: dict[str, CatalogueEntry] = {
    entry.method.name: entry
    for family in (rewards, tgpo, tropd, log_ratios, divergences, agents)
    for entry in family.ENTRIES
}
