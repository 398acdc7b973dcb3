"""Models that a recipe names by their id on the Hugging Face Hub. Imports no torch."""

import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from megatron_opd.architectures.config import ModelConfig
from megatron_opd.errors import DataError, first_line
from megatron_opd.recipe.keys import RunConfig
from megatron_opd.weights.headers import weights_are_there

# Pickled weights and those for other programs are not needed.
FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors")
_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
_LOCAL = ("models", "runs", "data")  # folders of the recipes, whether they are there yet or not


class HubModel(NamedTuple):
    """ORGANISATION/NAME, and a branch, tag or commit if not the newest."""

    name: str
    revision: str | None


def with_local_models(config: RunConfig) -> RunConfig:
    """`config` with the directories of its models in the place of their ids; see `local_model`."""
    student = _with_local_path(config.student)
    teacher = config.teacher and _with_local_path(config.teacher)
    return replace(config, student=student, teacher=teacher)


def local_model(path: str) -> str:
    """`path`, or the directory of the Hub's model of that id: in the cache, downloaded if need be.

    Raises DataError, with the command that downloads, where the model cannot be had.
    """
    model = parse_id(path)
    if model is None:
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    name = model.name
    revision = model.revision
    files = list(FILES)
    try:
        try:
            directory = snapshot_download(
                name, revision=revision, allow_patterns=files, local_files_only=True
            )
            if weights_are_there(Path(directory)):
                return directory
        except LocalEntryNotFoundError:
            pass
        return snapshot_download(name, revision=revision, allow_patterns=files)
    except Exception as error:  # the network, the Hub and the disk fail in many types
        cause = first_line(error)
        option = f" --revision {revision}" if revision else ""
        raise DataError(
            f"{path}: no such directory, and it cannot be had from the Hugging Face Hub "
            f"({cause:.200}); give a directory, or run where there is a network: hf download "
            f"{name}{option}"
        ) from error


def parse_id(path: str) -> HubModel | None:
    """The model that `path` may mean on the Hub; None where it can only be a directory."""
    match = _ID.fullmatch(path)
    if (
        match is None
        or Path(path).exists()
        or path.split("/")[0] in _LOCAL
        or Path(path).parent.exists()
    ):
        return None
    return HubModel(match["name"], match["revision"])


def _with_local_path[M: ModelConfig](model: M) -> M:
    return replace(model, path=local_model(model.path))
