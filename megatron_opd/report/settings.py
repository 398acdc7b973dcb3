"""The settings of a run, and those that differ from the recipe of its name or from the defaults."""

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, fields, is_dataclass
from typing import Any

from megatron_opd.errors import ConfigError
from megatron_opd.files.typed import InvalidKey, build
from megatron_opd.methods.catalogue import CATALOGUE
from megatron_opd.recipe.keys import RunConfig
from megatron_opd.recipe.load import load_config, recipe_files

_REQUIRED = ""  # the default of a key without one
FILLED_IN = ("data.sha256.", "data.template.date", "run_dir")  # by the run itself


@dataclass(frozen=True)
class Setting:
    """A key that was set."""

    key: str
    value: str
    recipe: str | None  # what the recipe says, where that is something else
    default: str


@dataclass(frozen=True)
class Settings:
    """All keys, by section, and those that were set."""

    sections: list[tuple[str, list[tuple[str, str]]]]
    changed: list[Setting]
    recipe: str  # the name of the recipe that says something else; "" where none does


def settings_of(tree: Mapping[str, Any]) -> Settings:
    """The settings in a run's `config.yaml`.

    A file that today's keys do not fit has sections alone: a report must not depend on them.
    """
    try:
        config = build(RunConfig, dict(tree))
    except (InvalidKey, ConfigError, KeyError, TypeError, ValueError):
        return Settings(_sections(tree), [], "")
    recipe = _recipe(config)
    own = dict(flatten(asdict(config)))
    defaults = dict(flatten(_defaults(config, None)))
    of_recipe = dict(flatten(asdict(recipe))) if recipe else own
    changed = []
    for key in dict.fromkeys([*own, *of_recipe]):
        value = own.get(key, "none")
        from_recipe = of_recipe.get(key, "none")
        default = defaults.get(key, _REQUIRED)
        differs = from_recipe != value
        if (differs or default != value) and not key.startswith(FILLED_IN):
            changed.append(Setting(key, value, from_recipe if differs else None, default))
    overridden = any(setting.recipe is not None for setting in changed)
    return Settings(_sections(tree), changed, config.name if overridden else "")


def _recipe(config: RunConfig) -> RunConfig | None:
    """The recipe with the run's name, as it is today; None where there is none that can be read."""
    if config.name not in recipe_files():
        return None
    try:
        return load_config(config.name)
    except ConfigError:
        return None


def _defaults(value: Any, default: Any) -> Any:
    """The tree of `value` with the defaults in place of its values.

    Those of a method are the catalogue's; those of something that is there where the default is
    nothing are its class's.
    """
    if isinstance(value, RunConfig) and value.method.name in CATALOGUE:
        method = CATALOGUE[value.method.name].method
        tree = {field.name: _of_field(value, None, field) for field in fields(value)}
        return tree | {"method": _defaults(value.method, method)}
    if is_dataclass(value):
        same = default if type(default) is type(value) else None
        return {field.name: _of_field(value, same, field) for field in fields(value)}
    if isinstance(value, Mapping):
        known = default if isinstance(default, Mapping) else {}
        return {key: _defaults(one, known.get(key, _REQUIRED)) for key, one in value.items()}
    return default


def _of_field(value: Any, default: Any, field: Field[Any]) -> Any:
    if default is not None:
        return _defaults(getattr(value, field.name), getattr(default, field.name))
    if field.default is not MISSING:
        return _defaults(getattr(value, field.name), field.default)
    if field.default_factory is not MISSING:
        return _defaults(getattr(value, field.name), field.default_factory())
    return _defaults(getattr(value, field.name), _REQUIRED)


# -------------------------------------------------------------------------------------- as a table
def _sections(tree: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Sections of keys and values: the recipe's plain keys first, then one for each mapping."""
    plain = []
    sections = []
    for key, value in tree.items():
        if not isinstance(value, Mapping):
            plain.append((key, text_of(value)))
        elif value:
            sections.append((key, list(flatten(value))))
    return [("run", plain), *sections] if plain else sections


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The keys of a tree, with dots, and their values in words."""
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", text_of(value)


def text_of(value: Any) -> str:
    """A value of a settings file in words."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ", ".join(map(text_of, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
