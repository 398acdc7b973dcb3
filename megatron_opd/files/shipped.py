"""Files that come with the package and are no Python: recipes, profiles of clusters."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def shipped(folder: str) -> Path:
    """A folder at the top of the repository, which a wheel has within the package (setup.py)."""
    within = PACKAGE / folder
    return within if within.is_dir() else PACKAGE.parent / folder
