"""What a run fixes at its start, so that it finds the same prompts when it goes on: the date, and
the data."""

from dataclasses import replace
from datetime import date

from megatron_opd.errors import DataError
from megatron_opd.recipe.keys import RunConfig
from megatron_opd.tasks.data_files import changed_data, data_sha256


def pin(config: RunConfig) -> RunConfig:
    """The recipe with today's date in its template and the hashes of its data files, where it has
    none yet."""
    data = config.data
    template = replace(data.template, date=data.template.date or date.today())
    return replace(
        config, data=replace(data, template=template, sha256=data.sha256 or data_sha256(data))
    )


def keep_pins(config: RunConfig, stored: RunConfig) -> RunConfig:
    """The recipe of a run that goes on, with what its config.yaml has fixed and the recipe leaves
    open."""
    data, before = config.data, stored.data
    template = replace(data.template, date=data.template.date or before.template.date)
    return replace(
        config, data=replace(data, template=template, sha256=data.sha256 or before.sha256)
    )


def check_unchanged(config: RunConfig) -> None:
    """Raises DataError when a data file is not the one that `data.sha256` was made from."""
    changed = changed_data(config.data.sha256, config.data)
    if changed is not None:
        raise DataError(
            f"{changed}: has changed since data.sha256 of config.yaml was made; bring the file "
            "back, or start a new run with data.sha256={}"
        )
