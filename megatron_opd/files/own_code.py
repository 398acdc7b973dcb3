"""Code of the user's that a recipe names: "module:name", or "file.py:name"."""

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from megatron_opd.errors import ConfigError


class NoOwnCode(Exception):
    """The module cannot be imported, or has no such name; the message is one line."""


def load_own(reference: str) -> object:
    """The object "module:name", whose module may lie in the working directory, or that of a file.

    Raises NoOwnCode.
    """
    module_name, _, name = reference.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
    is_file = module_name.endswith(".py")
    try:
        module = _load_file(module_name) if is_file else importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        remedy = "mend it" if is_file else "it must lie in the working directory or on PYTHONPATH"
        raise NoOwnCode(f"{module_name} cannot be imported: {reason}; {remedy}") from None
    if not hasattr(module, name):
        raise NoOwnCode(f"{module_name} has no {name}")
    return getattr(module, name)


def _load_file(path: str) -> ModuleType:
    """The module of a Python file, which can import what lies beside it."""
    file = Path(path).resolve()
    name = f"megatron_opd_own.{file.stem}"
    if (loaded := sys.modules.get(name)) is not None and loaded.__file__ == str(file):
        return loaded
    folder = str(file.parent)
    if folder not in sys.path:
        sys.path.append(folder)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None, "every .py has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look for it
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def checked_own(key: str, reference: str, what: str, *, beside: str = "") -> object:
    """The class or function that a recipe's key names. Raises ConfigError naming the key.

    `what` it must be, "Class" or "function"; `beside`: what else the key may hold.
    """
    if reference.count(":") != 1:
        raise ConfigError(f"{key}: must be {beside}written module:{what}, got {reference!r}")
    try:
        own = load_own(reference)
    except NoOwnCode as error:
        raise ConfigError(f"{key}: {error}") from None
    if not callable(own):
        raise ConfigError(f"{key}: {reference} is no {what}")
    return own
