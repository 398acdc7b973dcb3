"""Values of YAML 1.2 texts, texts of values, and errors in one line."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from megatron_opd.errors import ConfigError

MAX_VALUES = 10_000  # of a recipe; anchors can make any number of a few lines


class InvalidYaml(Exception):
    """The error of a text, in one line."""


def read_yaml(path: Path) -> dict[str, Any]:
    """The YAML 1.2 mapping in `path`. Raises ConfigError with the line of a syntax error."""
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    except InvalidYaml as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must be a mapping of keys")
    return tree


def parse_yaml(text: str) -> Any:
    """The value of a YAML 1.2 text. Raises InvalidYaml."""
    try:
        value = _yaml().load(text)
    except YAMLError as error:
        raise InvalidYaml(_syntax(error)) from None
    except Exception as error:
        # For tags and dates the parser passes on any exception of int() and its like.
        raise InvalidYaml(f"not valid YAML ({type(error).__name__}: {error})") from None
    if _counted(value, MAX_VALUES) > MAX_VALUES:
        raise InvalidYaml(
            f"has more than {MAX_VALUES} values, or one within itself; write it without anchors"
        )
    return value


def write_yaml(tree: Mapping[str, Any]) -> str:
    """The YAML text of a mapping."""
    text = io.StringIO()
    yaml = _yaml()
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.representer.add_representer(str, _represent_text)
    yaml.dump(tree, text)
    return text.getvalue()


def _counted(value: Any, limit: int) -> int:
    """The number of values, shared ones as often as they appear; counted not far beyond `limit`."""
    count = 0
    left = [value]
    while left and count <= limit:
        node = left.pop()
        count += 1
        if isinstance(node, dict):
            left.extend(node.values())
        elif isinstance(node, list | tuple | set):
            left.extend(node)
    return count


def _yaml() -> YAML:
    # The pure parser is of YAML 1.2, in which 1e-6 is a number, and on and yes are words.
    return YAML(typ="safe", pure=True)


def _represent_text(representer: Any, text: str) -> Any:
    # These are line breaks in YAML 1.1, whose rules the emitter follows. It escapes them in double
    # quotes.
    style = '"' if set(text) & set("\x85\u2028\u2029\ufeff") else None
    return representer.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _syntax(error: YAMLError) -> str:
    if not isinstance(error, MarkedYAMLError):
        return " ".join(str(error).split())
    line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
    return f"{line}{error.problem or error.context or 'not valid YAML'}"
