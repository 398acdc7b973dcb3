"""Reads a recipe (YAML) and `key=value` overrides into a validated `RunConfig`, and writes it back.

A recipe may name another as its `base`, and then holds its differences alone. `method` has three
spellings: a catalogue name; `{name: NAME, <term>: {<key>: ...}}`, which changes keys of the
catalogue's terms; and `{name: ANY, terms: {...}}`, which is complete and written by `dump_config`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from megatron_opd.errors import ConfigError
from megatron_opd.files.shipped import shipped
from megatron_opd.files.typed import InvalidKey, build, join, unknown
from megatron_opd.methods.catalogue import CATALOGUE
from megatron_opd.methods.method import MethodConfig
from megatron_opd.recipe.keys import RunConfig
from megatron_opd.recipe.yaml_text import InvalidYaml, parse_yaml, read_yaml, write_yaml

_KEYS_OF_METHOD = tuple(field.name for field in fields(MethodConfig))
_BESIDE_TERMS = tuple(key for key in _KEYS_OF_METHOD if key not in ("name", "terms"))
PACKAGED_RECIPES = shipped("recipes")


def load_config(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a recipe and applies the overrides in order.

    Args:
        recipe: path of a YAML file or of a run directory, or the name of a file in `recipes/`
            without its suffix.
        overrides: "a.b.c=value", the value in YAML.

    Raises ConfigError: one line that names the file or the override, and the key.
    """
    path = find_recipe(recipe)
    tree = read_recipe(path)
    source = str(path)
    try:
        for text in overrides:
            source = f"override {text!r}"
            _override(tree, text)
        source = str(path)
        if "method" in tree:
            tree["method"] = _expand_method(tree["method"])
        return build(RunConfig, tree)
    except InvalidKey as error:
        raise _located(error, source, overrides) from None


def dump_config(config: RunConfig) -> str:
    """The resolved recipe as YAML. `load_config` of it gives an equal `RunConfig`."""
    return write_yaml(asdict(config))


def recipe_files() -> dict[str, Path]:
    """The file of every recipe by name, in the package's recipes/ and in ./recipes, which wins."""
    files: dict[str, Path] = {}
    for folder in (PACKAGED_RECIPES, Path("recipes")):
        for path in sorted(folder.rglob("*.yaml")):
            files[str(path.relative_to(folder).with_suffix(""))] = path
    return dict(sorted(files.items()))


def describe_recipe(path: Path) -> tuple[str, str]:
    """The name of a recipe's method, and its first comment line. Raises ConfigError."""
    method = read_recipe(path).get("method", "")
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = next((line.lstrip("# ") for line in lines if line.startswith("#")), "")
    return str(method["name"] if isinstance(method, dict) and "name" in method else method), comment


def find_recipe(recipe: str) -> Path:
    """The file that `recipe` (a path, a run directory or a name) means. Raises ConfigError."""
    path = Path(recipe)
    if path.is_dir() and (path / "config.yaml").is_file():
        return path / "config.yaml"
    if path.is_file():
        return path
    known = recipe_files()
    if recipe in known:
        return known[recipe]
    if path.suffix in (".yaml", ".yml"):
        raise ConfigError(f"{recipe}: no such file")
    if path.is_dir():
        raise ConfigError(
            f"{recipe}: a directory without config.yaml; give a recipe or a run directory"
        )
    raise ConfigError(f"{recipe}: {unknown('recipe', recipe, known)}")


def read_recipe(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in `path` merged over its `base`, not yet validated. Raises ConfigError.

    Mappings are merged key by key, except `method`, which replaces the base's. `below` are the
    recipes that have this one as a base.
    """
    tree = read_yaml(path)
    if "base" not in tree:
        return tree
    base = tree.pop("base")
    below = (*below, path.resolve())
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: must be the name of a recipe, got {base!r}")
    if "name" not in tree:
        raise ConfigError(f"{path}: name: missing; a recipe with a base needs a name of its own")
    beside = path.parent / f"{base.removesuffix('.yaml')}.yaml"
    file = beside if beside.is_file() else find_recipe(base)
    if file.resolve() in below:
        raise ConfigError(f"{path}: base: {base} has this recipe as its base")
    under = read_recipe(file, below)
    if "method" in tree:
        under.pop("method", None)
    return _merge(under, tree)


def parse_override(text: str) -> tuple[str, Any]:
    """Key and value of "a.b.c=value", the value in YAML. Raises ConfigError."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(
            f"{text!r}: an override is written key=value, such as rollout.num_prompts=8"
        )
    try:
        return key, parse_yaml(value)
    except InvalidYaml as error:
        raise ConfigError(f"{text!r}: {error}; quote the value") from None


def _override(tree: dict[str, Any], text: str) -> None:
    key, value = parse_override(text)
    keys = _full_key(key).split(".")
    if key.startswith("method."):
        tree["method"] = _expand_method(tree.get("method"))
        terms = tree["method"]["terms"]
        if keys[1] == "terms" and len(keys) > 2 and keys[2] not in terms:
            raise InvalidKey(f"method.{keys[2]}", unknown("term", keys[2], terms))
    set_key(tree, keys, value)


def set_key(tree: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    """Sets the key with the path `keys`, and makes the mappings above it.

    Raises InvalidKey when one of them is no mapping.
    """
    node = tree
    path = ""
    for name in keys[:-1]:
        path = join(path, name)
        if node.get(name) is None:
            node[name] = {}
        if not isinstance(node[name], dict):
            raise InvalidKey(
                _short_key(path),
                f"is {node[name]!r}, which has no keys; set {_short_key(path)} itself",
            )
        node = node[name]
    node[keys[-1]] = value


def _full_key(key: str) -> str:
    """The key of a resolved recipe: `method.terms.x.weight` for `method.x.weight`."""
    first, _, rest = key.partition(".")
    if first != "method" or not rest or rest.partition(".")[0] in ("terms", *_BESIDE_TERMS):
        return key
    if rest == "name":
        raise InvalidKey(key, "cannot be overridden; method=NAME chooses another method")
    return f"method.terms.{rest}"


def _short_key(key: str) -> str:
    return key.replace("method.terms.", "method.", 1) if key.startswith("method.terms.") else key


def _expand_method(node: Any) -> dict[str, Any]:
    """The complete spelling of `method`, whose values are not validated yet."""
    if isinstance(node, str):
        node = {"name": node}
    if not isinstance(node, Mapping):
        raise InvalidKey("method", f"must be a name or a mapping; names: {', '.join(CATALOGUE)}")
    if "name" not in node:
        raise InvalidKey("method.name", "missing; it has no default")
    name = str(node["name"])
    base: dict[str, Any] = {"terms": node.get("terms", {})}
    if "terms" not in node:
        if name not in CATALOGUE:
            raise InvalidKey("method", f"{name!r}: {unknown('method', name, CATALOGUE)}")
        base = asdict(CATALOGUE[name].method)
    terms = base["terms"]
    if not isinstance(terms, Mapping) or not terms:
        raise InvalidKey("method.terms", "must be a mapping of at least one term")
    changed = [key for key in node if key not in ("name", "terms", *_BESIDE_TERMS)]
    changes = {str(key): node[key] for key in changed}
    for term in changes:
        if term not in terms:
            raise InvalidKey(f"method.{term}", unknown("term", term, terms))
    beside = {key: node[key] for key in _BESIDE_TERMS if key in node}
    return _merge(base, {"name": node["name"], "terms": changes, **beside})


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping `changes` merged over `base`; a mapping of another kind replaces the old one."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if _is_same_kind(old, value) else value  # type: ignore[arg-type]
    return merged


def _is_same_kind(old: Any, new: Any) -> bool:
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return False
    return new.get("kind") in (None, old.get("kind"))


def _located(error: InvalidKey, source: str, overrides: Sequence[str]) -> ConfigError:
    """The error with the override that set the key, or else with the file."""
    path = _short_key(error.path)
    for text in reversed(overrides):
        key = _short_key(text.partition("=")[0])
        if path == key or path.startswith(f"{key}."):
            where = "" if path == key else f"{path}: "
            return ConfigError(f"override {text!r}: {where}{error.problem}")
    return ConfigError(
        f"{source}: {path}: {error.problem}" if path else f"{source}: {error.problem}"
    )
