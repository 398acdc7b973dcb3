"""The plan of a recipe on a cluster: memory and time of its own layout and of all others."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_opd.architectures.known import architectures
from megatron_opd.errors import ConfigError
from megatron_opd.planning.hardware import hardware
from megatron_opd.recipe.keys import RunConfig

if TYPE_CHECKING:  # these import Megatron
    from megatron_opd.planning.case import Case
    from megatron_opd.planning.layouts import Candidate


@dataclass(frozen=True)
class ClusterPlan:
    """Memory and time of a recipe's layouts on a cluster."""

    case: "Case"
    own: "Candidate"  # with the recipe's layouts
    others: Sequence["Candidate"]
    notes: Sequence[str]  # the sizes that were taken from the table of known models

    @property
    def fits(self) -> bool:
        """True when the recipe's own layouts fit."""
        return self.own.lacks is None

    def show(self) -> None:
        """Prints the tables of `megatron-opd plan`."""
        from megatron_opd.planning.report import print_plan

        print_plan(self.case, self.own, self.others, self.notes)

    def as_json(self) -> dict[str, Any]:
        """All that the plan has, in bytes and seconds."""
        from megatron_opd.planning.report import as_json

        return as_json(self.case, self.own, self.others, self.notes)


def make_plan(config: RunConfig, *, gpus: int, gpu: str, gpus_per_node: int) -> ClusterPlan:
    """Plans the recipe for `gpus` devices of the kind `gpu`. Raises ConfigError, DataError."""
    per_node = min(gpus, gpus_per_node)
    if gpus % per_node:
        raise ConfigError(
            f"--gpus: {gpus} is no multiple of the {per_node} of a node; give whole nodes"
        )
    device = hardware(gpu, per_node)
    if device.is_cuda and config.precision == "float32":
        raise ConfigError(
            "precision: float32 on a GPU is not planned, its attention keeps whole score "
            "matrices; set bfloat16"
        )
    sizes, notes = architectures(config.models)
    from megatron_opd.planning.case import Case  # imports Megatron

    case = Case(config, sizes, device, gpus, per_node)
    case.check()
    from megatron_opd.planning.layouts import candidate, candidates

    return ClusterPlan(case, candidate(case), candidates(case), notes)
