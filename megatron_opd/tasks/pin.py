"""The date and the data that a run fixes at its start, to have the same prompts when it goes on."""

from dataclasses import replace
from datetime import date

from megatron_opd.errors import DataError
from megatron_opd.recipe.keys import RunConfig
from megatron_opd.tasks.data_files import changed_data, data_sha256


def pin(config: RunConfig) -> RunConfig:
    """The recipe with today's date and the hashes of its data files, unless it has them already."""
    data = config.data
    template = replace(data.template, date=data.template.date or date.today())
    sha256 = data.sha256 or data_sha256(data)
    return replace(config, data=replace(data, template=template, sha256=sha256))


def keep_pins(config: RunConfig, stored: RunConfig) -> RunConfig:
    """The recipe of a run that goes on, with date and hashes of the run's recipe `stored`.

    Its own date and hashes, if it has some, are kept.
    """
    data = config.data
    template = replace(data.template, date=data.template.date or stored.data.template.date)
    sha256 = data.sha256 or stored.data.sha256
    return replace(config, data=replace(data, template=template, sha256=sha256))


def check_unchanged(config: RunConfig) -> None:
    """Raises DataError when a data file is not the one that `data.sha256` was made from."""
    changed = changed_data(config.data.sha256, config.data)
    if changed is not None:
        raise DataError(
            f"{changed}: has changed since data.sha256 of config.yaml was made; bring the file "
            "back, or start a new run with data.sha256={}"
        )
