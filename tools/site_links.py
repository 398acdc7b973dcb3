"""A hook of mkdocs: links from docs/ to other files of the repository.

Such a file is no page of the site, so its link becomes the file's path in the text. Raises
PluginError, which ends the build, where the file does not exist.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

REPOSITORY = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"\[([^\]]*)\]\(((?:\.\./)+[^)#\s]*)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, **others: Any) -> str:
    """The page with paths in the place of links that leave docs/."""
    folder = (REPOSITORY / "docs" / page.file.src_uri).parent
    return _LINK.sub(lambda link: _outside(link, folder, page.file.src_uri), markdown)


def _outside(link: re.Match[str], folder: Path, source: str) -> str:
    target = (folder / link[2]).resolve()
    if not target.exists():
        raise PluginError(f"docs/{source}: {link[2]}: no such file")
    if target.is_relative_to(REPOSITORY / "docs"):
        return link[0]
    path = target.relative_to(REPOSITORY)
    return f"`{path}`" if link[1].strip("`") in (str(path), path.name) else f"{link[1]} (`{path}`)"
