"""Code of the user's that a recipe names: "module:name"."""

import importlib
import os
import sys

from megatron_opd.errors import ConfigError


class NoOwnCode(Exception):
    """The module cannot be imported, or has no such name; the message is one line."""


def load_own(reference: str) -> object:
    """The object "module:name", whose module may lie in the working directory. Raises NoOwnCode."""
    module_name, _, name = reference.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise NoOwnCode(
            f"{module_name} cannot be imported: {reason}; it must lie in the working directory or "
            "on PYTHONPATH"
        ) from None
    if not hasattr(module, name):
        raise NoOwnCode(f"{module_name} has no {name}")
    return getattr(module, name)


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
