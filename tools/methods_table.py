"""The catalogue of methods as a table: docs/methods.md holds it, make_docs.py puts it there."""

from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_args, get_type_hints

from megatron_opd.methods.catalogue import CATALOGUE
from megatron_opd.methods.needs import needs_of
from megatron_opd.methods.part import Needs
from megatron_opd.methods.schedules import Schedule
from megatron_opd.recipe.load import PACKAGED_RECIPES, describe_recipe

MOST_RECIPES = 4  # of a folder that are named


def catalogue_table() -> str:
    """One row per method, and under it what the papers leave open."""
    rows = [
        "| method | loss | source | signals | terms | recipes |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    recipes = recipes_by_method()
    for name, entry in CATALOGUE.items():
        each_term = "<br>".join(
            f"`{key}`: {describe(term)}" for key, term in entry.method.terms.items()
        )
        cells = [
            f"`{name}`",
            entry.summary,
            entry.source,
            signals(needs_of(entry.method)),
            each_term,
        ]
        cells.append("<br>".join(_few(recipes.get(name, []))))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    choices = [
        f"- `{name}`: {entry.left_open}." for name, entry in CATALOGUE.items() if entry.left_open
    ]
    return (
        "\n".join([*rows, "", "What the papers leave open, and what is chosen here:", "", *choices])
        + "\n"
    )


def _few(recipes: list[str]) -> list[str]:
    """The names of recipes; where a folder has many, the folder and their number."""
    by_folder: dict[str, list[str]] = {}
    for recipe in recipes:
        by_folder.setdefault(recipe.rpartition("/")[0], []).append(recipe)
    cells = []
    for folder, names in by_folder.items():
        many = folder and len(names) > MOST_RECIPES
        cells += [f"`{folder}/` ({len(names)})"] if many else [f"`{name}`" for name in names]
    return cells


def parts_table(union: Any) -> str:
    """The kinds of a family of parts, each with its formula."""
    rows = ["| `kind` | |", "|---|---|"]
    for part in get_args(union) or (union,):
        kinds = ", ".join(f"`{kind}`" for kind in get_args(get_type_hints(part)["kind"]))
        rows.append(f"| {kinds} | {part.formula} |")
    return "\n".join(rows) + "\n"


def recipes_by_method() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in sorted(PACKAGED_RECIPES.rglob("*.yaml")):
        name = path.relative_to(PACKAGED_RECIPES).with_suffix("")
        found.setdefault(describe_recipe(path)[0], []).append(str(name))
    return found


def signals(needs: Needs) -> str:
    names = {
        "rollouts": "samples",
        "traces": "traces",
        "rewards": "rewards",
        "teacher": "teacher's logprob and argmax",
        "teacher_head": "teacher's distribution",
        "reference": "reference",
        "process": "process model",
        "student_pass": "a pass before the update",
    }
    asked = [words for key, words in names.items() if getattr(needs, key)]
    return ", ".join([*asked, *([f"teacher's top {needs.topk}"] if needs.topk else [])])


def describe(term: Any) -> str:
    """The kind, the weight, and every key that differs from its default."""
    usual = {
        each.name: each.default_factory()
        if each.default is MISSING and each.default_factory is not MISSING
        else each.default
        for each in fields(term)
    }
    changed = [
        f"{each.name} {shown(getattr(term, each.name))}"
        for each in fields(term)
        if each.name not in ("kind", "weight") and getattr(term, each.name) != usual[each.name]
    ]
    return ", ".join([term.kind, f"weight {shown(term.weight)}", *changed])


def shown(value: Any) -> str:
    """A part in a few words: its kind and the keys that differ from their defaults."""
    match value:
        case Schedule():
            return value.words()
        case dict():
            return "(" + " + ".join(shown(each) for each in value.values()) + ")"
        case float():
            return f"{value:g}"
    if not is_dataclass(value):
        return str(value)
    keys = [f"{each.name} {shown(getattr(value, each.name))}" for each in fields(value)
            if each.name != "kind" and getattr(value, each.name) != each.default]  # fmt: skip
    return " ".join([str(getattr(value, "kind", "")), *keys])
