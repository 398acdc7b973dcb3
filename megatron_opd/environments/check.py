"""What can be said of an environment before its processes start."""

import importlib.util
import inspect
import os
from collections.abc import Mapping
from pathlib import Path

from megatron_opd.environments.open import KINDS, ids_in_file
from megatron_opd.environments.worker import GYMNASIUM_ID
from megatron_opd.errors import ConfigError
from megatron_opd.files.own_code import checked_own, load_own
from megatron_opd.files.typed import unknown
from megatron_opd.recipe.agents import EnvironmentConfig


def check_environment(config: EnvironmentConfig) -> None:
    """The kind exists, its options and data are there, and so is its dialogue.

    Code that another interpreter imports is not looked at. Raises ConfigError naming the key.
    """
    _check_kind(config)
    if config.python and not os.access(config.python, os.X_OK):
        raise ConfigError(
            f"environment.python: {config.python} is no program; name a Python that has the "
            "environment's packages"
        )
    if config.dialogue:
        _own_class("environment.dialogue", config.dialogue, ("prompt", "reply", "action"))
    for which in ("train", "heldout"):
        tasks = getattr(config, which)
        if isinstance(tasks, str) and Path(tasks).is_file():
            ids_in_file(Path(tasks), which)


def _check_kind(config: EnvironmentConfig) -> None:
    if config.kind in KINDS:
        own_class = load_own(KINDS[config.kind][0])
        check = getattr(own_class, "check", None)
        _check_options(own_class, config.options)
        if problem := check(config.options) if check else None:
            raise ConfigError(f"environment.options: {problem}")
    elif GYMNASIUM_ID.fullmatch(config.kind):
        if config.python is None and importlib.util.find_spec("gymnasium") is None:
            raise ConfigError(
                f"environment.kind: {config.kind} is a gymnasium id, and gymnasium is not "
                "installed; install it, or name a module:Class"
            )
    elif config.kind.count(":") != 1:
        problem = unknown("kind", config.kind, KINDS)
        raise ConfigError(f"environment.kind: {problem}, or module:Class, or a gymnasium id")
    elif config.python is None:
        own_class = _own_class("environment.kind", config.kind, ("reset", "step"))
        _check_options(own_class, config.options)


def _own_class(key: str, reference: str, methods: tuple[str, ...]) -> object:
    own_class = checked_own(key, reference, "Class")
    missing = [name for name in methods if not callable(getattr(own_class, name, None))]
    if missing:
        raise ConfigError(f"{key}: {reference} has no {' and no '.join(missing)}")
    return own_class


def _check_options(own_class: object, options: Mapping[str, object]) -> None:
    """The names of the options are among those that the class is made with."""
    assert callable(own_class)
    parameters = inspect.signature(own_class).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for name in options:
        if name not in parameters:
            problem = unknown("option", name, parameters)
            raise ConfigError(f"environment.options.{name}: {problem}")
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in options:
            raise ConfigError(f"environment.options.{name}: missing; the environment needs it")
