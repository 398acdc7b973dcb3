"""The environments that a recipe asks for, their tasks, and the words spoken with them."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import cast

from megatron_opd.contracts.environments import Dialogue, Environments
from megatron_opd.environments.pool import EnvironmentPool
from megatron_opd.errors import ConfigError
from megatron_opd.files.own_code import load_own
from megatron_opd.recipe.agents import EnvironmentConfig

_HERE = "megatron_opd.environments"
# Names in recipes: the environment's class, which a worker imports, and its dialogue's.
KINDS = {
    "search_qa": (f"{_HERE}.search_qa:SearchQA", f"{_HERE}.search_qa_dialogue:SearchDialogue"),
    "webshop": (f"{_HERE}.webshop:WebShop", f"{_HERE}.webshop_dialogue:WebShopDialogue"),
    "workshop": (f"{_HERE}.workshop:Workshop", f"{_HERE}.workshop_dialogue:WorkshopDialogue"),
    "alfworld": (f"{_HERE}.alfworld:AlfWorld", f"{_HERE}.alfworld_dialogue:AlfWorldDialogue"),
}
PLAIN_DIALOGUE = f"{_HERE}.plain:PlainDialogue"


def open_environments(config: EnvironmentConfig, closing: contextlib.ExitStack) -> EnvironmentPool:
    """The recipe's environments. Their processes start in the background; `closing` ends them."""
    pool = EnvironmentPool(class_of(config.kind), config)
    closing.callback(pool.close)
    pool.warm_up()
    return pool


def open_dialogue(config: EnvironmentConfig) -> Dialogue:
    """The dialogue of the recipe, of its environment, or else the plain one."""
    own = KINDS[config.kind][1] if config.kind in KINDS else PLAIN_DIALOGUE
    make = cast(Callable[[EnvironmentConfig], Dialogue], load_own(config.dialogue or own))
    return make(config)


def task_ids(config: EnvironmentConfig, which: str, environments: Environments) -> list[str]:
    """The ids of `environment.train` or `environment.heldout`, in a fixed order.

    Raises ConfigError for a file without ids or with one twice, RunError where the environment
    does not name the split.
    """
    tasks: str | int = {"train": config.train, "heldout": config.heldout}[which]
    if isinstance(tasks, int):
        return [str(number) for number in range(tasks)]
    if Path(tasks).is_file():
        return ids_in_file(Path(tasks), which)
    ids = environments.task_ids(tasks)
    if not ids:
        raise ConfigError(
            f"environment.{which}: {config.kind} has no tasks in {tasks!r}, and there is no such "
            "file"
        )
    return ids


def ids_in_file(path: Path, which: str) -> list[str]:
    """A task id per line, blank lines left out. Raises ConfigError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"environment.{which}: {path} cannot be read: {error}") from None
    first_line: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        if line in first_line:
            raise ConfigError(
                f"environment.{which}: {path}: {line!r} is in line {first_line[line]} and in line "
                f"{number}; a task is drawn once"
            )
        if line:
            first_line[line] = number
    if not first_line:
        raise ConfigError(f"environment.{which}: {path} has no task ids; write one per line")
    return list(first_line)


def class_of(kind: str) -> str:
    """What a worker makes for a recipe's kind: "module:Class", or a gymnasium id."""
    return KINDS[kind][0] if kind in KINDS else kind
