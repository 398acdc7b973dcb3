"""`megatron-opd plan`."""

import json
from pathlib import Path

from megatron_opd.architectures.known import architectures
from megatron_opd.errors import ConfigError
from megatron_opd.planning.hardware import hardware
from megatron_opd.recipe.keys import RunConfig


def print_plan(config: RunConfig, *, gpus: int, gpu: str, gpus_per_node: int, out: Path | None) -> int:
    """Prints the plan; returns 0 if the recipe's own layout fits, else 1. Raises ConfigError, DataError."""
    per_node = min(gpus, gpus_per_node)
    if gpus % per_node:
        raise ConfigError(f"--gpus: {gpus} is no multiple of the {per_node} of a node; give whole nodes")
    device = hardware(gpu, per_node)
    if device.is_cuda and config.precision == "float32":
        raise ConfigError(
            "precision: float32 on a GPU is not planned, its attention keeps whole score matrices; set bfloat16"
        )
    if out is not None and not out.parent.is_dir():
        raise ConfigError(f"--json: {out.parent} is no directory; make it first")
    sizes, notes = architectures(config)
    from megatron_opd.planning.case import Case  # imports Megatron

    case = Case(config, sizes, device, gpus, per_node)
    case.check()
    from megatron_opd.planning.layouts import candidate, candidates
    from megatron_opd.planning.report import as_json, print_plan

    own, others = candidate(case), candidates(case)
    print_plan(case, own, others, notes)
    if out is not None:
        out.write_text(json.dumps(as_json(case, own, others, notes), indent=1) + "\n")
    return 0 if own.lacks is None else 1
