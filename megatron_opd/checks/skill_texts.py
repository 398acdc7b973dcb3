"""What the tasks of a recipe get from a bank of skills, and whether it fits."""

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_opd.contracts.environments import Observation
from megatron_opd.contracts.skills import Skill
from megatron_opd.environments.open import open_environments, task_ids
from megatron_opd.errors import ConfigError, RunError
from megatron_opd.recipe.agents import EnvironmentConfig, SkillsConfig
from megatron_opd.recipe.keys import RunConfig
from megatron_opd.skills.bank import Bank, load_bank
from megatron_opd.skills.open import open_retriever
from megatron_opd.tasks.tokenizer import tokenizer_for_checks

ASKED = 32  # tasks of an environment, at most, that are looked at
Count = Callable[[str], int]


def tokens_of(model_dir: str) -> Count:
    """A function that counts the tokens of a text. Raises DataError for no tokenizer."""
    tokenizer = tokenizer_for_checks(model_dir)

    def count(text: str) -> int:
        return len(tokenizer([text], add_special_tokens=False)["input_ids"][0])

    return count


def check_skill_texts(config: RunConfig) -> None:
    """The bank can be read and serves, and its texts are no longer than skills.max_tokens.

    Tasks that several categories match get longer ones, which a run meets by itself. Raises
    ConfigError.
    """
    skills = config.skills
    if skills is None:
        return
    open_retriever(skills, config.seed)
    sizes = _sizes(load_bank(skills.bank), skills, tokens_of(config.student.path))
    if too_long := _too_long(sizes, skills):
        raise ConfigError(too_long)


def describe_bank(path: str) -> list[str]:
    """A bank by itself: its categories, what they are for, and their words."""
    bank = load_bank(path)
    rows = [("CATEGORY", "SKILLS", "WORDS", "KINDS OF TASKS", "KEYWORDS")]
    words = lambda text: str(len(text.split()))  # noqa: E731
    for category in bank.categories:
        text = bank.text_of([category])
        kinds, keywords = (", ".join(x) for x in (category.task_types, category.keywords))
        rows.append((category.name, str(category.count), words(text), kinds or "-", keywords))
    rows.append(("general", str(bank.general_count), words(bank.general), "all others", ""))
    return [_title(bank), *_table(rows)]


def describe_recipe(config: RunConfig) -> tuple[list[str], bool]:
    """What the tasks of a recipe get, and True if all of it fits. Plays no turn.

    Raises ConfigError for a recipe without skills.
    """
    if config.skills is None:
        raise ConfigError("skills: missing, so there is nothing to check; give skills.bank")
    skills = config.skills
    open_retriever(skills, config.seed)
    bank = load_bank(skills.bank)
    count = tokens_of(config.student.path)
    sizes = _sizes(bank, skills, count)
    rows = [("TEXT", "TOKENS"), *((name, str(size)) for name, size in sizes.items())]
    lines = [_title(bank), *_table(rows)]
    if config.environment:
        seen, largest = _describe_tasks(config, config.environment, skills, count)
        lines += seen
        sizes = sizes | largest
    too_long = _too_long(sizes, skills)
    lines.append(too_long or f"all fit skills.max_tokens={skills.max_tokens}")
    return lines, not too_long


def is_bank(path: str) -> bool:
    """True for what only a bank can be; a recipe is a .yaml file, a name or a run directory."""
    return path.endswith(".json") or (Path(path) / "skill_mapping.json").is_file()


# ---------------------------------------------------------------------------------------- internals
def _sizes(bank: Bank, skills: SkillsConfig, count: Count) -> dict[str, int]:
    """The length of every text that the retrieval can give, but for those of several categories."""
    if skills.retrieval == "full":
        return {"full": count(bank.text_of(bank.categories))}
    sizes = {category.name: count(bank.text_of([category])) for category in bank.categories}
    if skills.retrieval in ("keyword", "substring"):
        sizes["general"] = count(bank.general)
    return sizes


def _too_long(sizes: dict[str, int], skills: SkillsConfig) -> str:
    """A line that names the texts that do not fit; "" where all do."""
    long = {name: size for name, size in sizes.items() if size > skills.max_tokens}
    if not long:
        return ""
    named = ", ".join(f"{name} ({size})" for name, size in list(long.items())[:4])
    more = f" and {len(long) - 4} more" if len(long) > 4 else ""
    return (
        f"skills.max_tokens: {skills.max_tokens} is less than the tokens of {named}{more}; raise "
        f"it to {max(long.values())}, or shorten the texts of {skills.bank}"
    )


def _describe_tasks(
    config: RunConfig, environment: EnvironmentConfig, skills: SkillsConfig, count: Count
) -> tuple[list[str], dict[str, int]]:
    """A line for every kind among some tasks, and the length of every text they get."""
    retriever = open_retriever(skills, config.seed)
    names: dict[str, Counter[str]] = {}
    sizes: dict[str, int] = {}
    several: dict[str, str] = {}  # an example of a task that more than one category matches
    seen = _some_tasks(environment, config.seed)
    for number, task in enumerate(seen):
        skill: Skill = retriever.retrieve(task.task_type, task.task, (0, number))
        names.setdefault(task.task_type or "-", Counter())[skill.name] += 1
        sizes[skill.name] = count(skill.text)
        if "+" in skill.name:
            several.setdefault(skill.name, task.task)
    rows = [("KIND OF TASK", "TASKS", "GETS")]
    for kind, counter in sorted(names.items()):
        gets = ", ".join(f"{name} ({times})" for name, times in counter.most_common())
        rows.append((kind, str(counter.total()), gets))
    lines = [f"{len(seen)} training tasks of {environment.kind}:", *_table(rows)]
    nothing = sum(counter["general"] for counter in names.values())
    if nothing:
        kinds = ", ".join(kind for kind, counter in sorted(names.items()) if counter["general"])
        lines.append(
            f"{nothing} of {len(seen)} tasks match nothing and get the general skills alone "
            f"({kinds}); name their kinds or words in {skills.bank}"
        )
    for name, words in list(several.items())[:4]:
        lines.append(f"{words!r} matches several and gets {name}")
    return lines, sizes


def _some_tasks(environment: EnvironmentConfig, seed: int) -> list[Observation]:
    """The first observations of training tasks from all over their list. Raises RunError where one
    fails."""
    with contextlib.ExitStack() as closing:
        pool = open_environments(environment, closing)
        ids = task_ids(environment, "train", pool)
        ids = ids[:: -(-len(ids) // ASKED)]
        seen: dict[int, Observation] = {}
        for slot, task_id in enumerate(ids):
            pool.reset(slot, task_id, seed)
        while len(seen) < len(ids):
            seen |= dict(pool.ready(environment.reset_seconds))
        for slot, observation in sorted(seen.items()):
            if observation.failed:
                raise RunError(f"{environment.kind}: task {ids[slot]}: {observation.failed}")
        return [observation for _, observation in sorted(seen.items())]


def _title(bank: Bank) -> str:
    return (
        f"{bank.path}: {bank.general_count} general skills, "
        f"{sum(category.count for category in bank.categories)} in {len(bank.categories)} "
        "categories"
    )


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
