"""The architectures of a recipe's models: from their directories, or, where these are not, from a shipped table."""

import json
from pathlib import Path

from megatron_opd.architectures.architecture import Architecture, architecture_of, changed, parse_architecture
from megatron_opd.architectures.config import ModelConfig
from megatron_opd.errors import DataError
from megatron_opd.recipe.keys import RunConfig

TABLE = Path(__file__).with_name("known.json")  # config.json's sizes of the models that our recipes name


def architectures(config: RunConfig) -> tuple[dict[str, Architecture], list[str]]:
    """Those of "student" and "teacher", and a line for each that was taken from the table. Raises DataError."""
    found, notes = {}, []
    for name, model in (("student", config.student), ("teacher", config.teacher)):
        if model is None:
            continue
        if Path(model.path).is_dir():
            found[name] = architecture_of(model)
        else:
            found[name] = _from_table(name, model)
            notes.append(f"{name}.path: {model.path} is not here; sizes of {Path(model.path).name} from the table")
    return found, notes


def _from_table(name: str, model: ModelConfig) -> Architecture:
    table, key = json.loads(TABLE.read_text()), Path(model.path).name
    if key not in table:
        raise DataError(
            f"{name}.path: {model.path} is no directory, and {key} is none of the known {', '.join(table)}; "
            "give a directory with its config.json"
        )
    return changed(parse_architecture(table[key], TABLE), model)
