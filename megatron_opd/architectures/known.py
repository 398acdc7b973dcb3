"""The architectures of a recipe's models, from their directories or from a shipped table."""

import json
from collections.abc import Mapping
from pathlib import Path

from megatron_opd.architectures.architecture import (
    Architecture,
    architecture_of,
    changed,
    parse_architecture,
)
from megatron_opd.architectures.config import ModelConfig
from megatron_opd.errors import DataError

# config.json's sizes of the models that our recipes name, and of others that are often used
TABLE = Path(__file__).with_name("known.json")


def architectures(models: Mapping[str, ModelConfig]) -> tuple[dict[str, Architecture], list[str]]:
    """The architectures of the recipe's models by role, and a line for each one from the table.

    Raises DataError where a model is neither a directory nor in the table.
    """
    by_role: dict[str, Architecture] = {}
    notes = []
    for role, model in models.items():
        if Path(model.path).is_dir():
            by_role[role] = architecture_of(model)
        else:
            by_role[role] = _from_table(role, model)
            notes.append(
                f"{role}.path: {model.path} is not here; sizes of {Path(model.path).name} from the "
                "table"
            )
    return by_role, notes


def _from_table(role: str, model: ModelConfig) -> Architecture:
    table = json.loads(TABLE.read_text())
    key = Path(model.path).name
    if key not in table:
        raise DataError(
            f"{role}.path: {model.path} is no directory, and {key} is none of the known "
            f"{', '.join(table)}; give a directory with its config.json"
        )
    return changed(parse_architecture(table[key], TABLE), model)
