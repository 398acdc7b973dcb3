"""The templates of pages: escaped, self-contained, in one style."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def page_template(folder: Path, name: str) -> Any:
    """The template `name` of a folder, which may include this folder's style.css.

    Sampled text is untrusted: all of it is escaped, and a page's own policy forbids scripts and
    the network.
    """
    environment = Environment(
        loader=FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent_of
    return environment.get_template(name)


def percent_of(fraction: float) -> str:
    return f"{fraction:.1%}"
