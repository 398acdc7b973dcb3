"""Code of the user's that a recipe names: "module:name"."""

import importlib
import os
import sys


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
