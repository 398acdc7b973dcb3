"""Recipes with a fault in one place, drawn from a seed: what the recipe files hold, with another
value, key or text."""

import copy
import datetime
import math
import random
from typing import Any

from megatron_opd.recipe.load import read_recipe, recipe_files

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 3, 2**31, 2**32, 2**63, 10**30, -(10**30), 0.5, -0.5,
    1e-320, 1e308,
    math.nan, math.inf, -math.inf, "", " ", "a", "1", "1e-3", "null", "true",
    "\u00e9\u2028", "\x85",
    "a\nb", "x" * 5000, "..", "/", "~", "/dev/null", "/proc/self/mem", "$HOME",
    "*.jsonl", "{problem}",
    [], [1], ["a"], [[[]]], [None], {}, {"kind": "a"}, {"kind": []}, {"kind": {}}, {"kind": None},
    {"a": {}}, {1: 2}, {None: 1}, {"name": "a"}, {"start": 1, "decay": -1},
    {"kind": "cosine", "start": 0, "steps": 1}, datetime.date(2026, 1, 1), b"bytes", {"a", "b"},
]  # fmt: skip
TEXTS = [
    "\t", "\t- ", "!!python/object/apply:os.system [true]", "!!int a", "!!float []",
    "!!timestamp 2026-99-99", "2026-99-99", "!!binary '@'", "!!set {a}", "!!omap [a]", "!unknown 1",
    "&a [*a]", "&a {b: *a}", "*nothing", "<<: 3", "? [a]\n: b", "{[1]: 2}", "--- \n", "...\n",
    "%YAML 9.9\n---\n", "\x00", "\x07", "\ufeff", "\ud800", "[" * 300, "{a: " * 300, "'", '"', "|",
    "|9", ">-", ": :", "- -", "@", "`", "#", "\\", '"\\ud800"', '"\\x00"', "0x", "0o8", "1__0",
    "12:30:45", ".", "-", "+", "1e999", "-.inf", ".NaN", "~", "=", "<<", "NULL", "9" * 5000,
]  # fmt: skip
BOMB = "".join(
    f"k{i}: &k{i} [{', '.join([f'*k{i - 1}'] * 9 if i else ['lol'])}]\n" for i in range(12)
)


def whole_recipes(paths: dict[str, str]) -> list[dict[str, Any]]:
    """Every third packaged recipe as one mapping, with other models and data; of those of agents,
    which differ in little, a few."""
    files = recipe_files()
    agents = [name for name in files if name.startswith("agents/")]
    names = [name for name in files if name not in agents][::3] + agents[::25]
    recipes = []
    for file in (files[name] for name in names):
        tree = read_recipe(file)
        if tree.get("environment"):
            tree["environment"] |= {"kind": "workshop", "options": {}, "python": None}
        if tree.get("skills"):
            tree["skills"]["bank"] = paths["bank"]
        for role in ("student", "teacher"):
            if tree.get(role):
                tree[role]["path"] = paths[role]
                tree[role].get("layout", {}).pop("expert_model_parallel_size", None)
        data = tree.get("data") or {}
        data |= {key: paths["data"] for key in ("train", "heldout") if data.get(key)}
        for name, suite in (tree.get("eval") or {}).get("suites", {}).items():
            suite["data"] = f"{paths['suites']}/{name}"
        recipes.append(tree | {"run_dir": paths["run_dir"]})
    return recipes


def mutate(tree: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """`tree` with one or two changes: another value, a key gone, a key renamed, one too many, or
    one moved."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2))):
        keys = rng.choice(list(_paths(tree)))
        parent = tree
        for key in keys[:-1]:
            parent = parent[key]
        last = keys[-1]
        match rng.randrange(8):
            case 0:
                del parent[last]
            case 1 if isinstance(parent, dict):
                parent[f"{last}{rng.choice('sx_. ')}"] = parent.pop(last)
            case 2 if isinstance(parent, dict):
                parent[rng.choice(("extra", "kind", "layout", "weight", "k", 7, ""))] = rng.choice(
                    VALUES
                )
            case 3:
                parent[last] = rng.choice(([parent[last]], {"a": parent[last]}, str(parent[last])))
            case _:
                parent[last] = rng.choice(VALUES)
    return tree


def mangle(text: str, rng: random.Random) -> str:
    """The text of a recipe with characters that do not belong there, or without some that do."""
    at = rng.randrange(len(text))
    match rng.randrange(5):
        case 0:
            return text[:at] + text[at + rng.randrange(1, 20) :]
        case 1:
            return text[:at]
        case 2:
            line = text[:at].rfind("\n") + 1
            return text[:line] + rng.choice(TEXTS) + "\n" + text[line:]
        case 3:
            colon = text.find(": ", at)
            return (
                text[: colon + 2]
                + rng.choice(TEXTS)
                + text[max(text.find("\n", colon), colon + 2) :]
            )
        case _:
            return text[:at] + rng.choice(TEXTS) + text[at:]


def _paths(node: Any, above: tuple[Any, ...] = ()) -> Any:
    items = (
        node.items()
        if isinstance(node, dict)
        else enumerate(node)
        if isinstance(node, list)
        else ()
    )
    for key, value in items:
        yield (*above, key)
        yield from _paths(value, (*above, key))
