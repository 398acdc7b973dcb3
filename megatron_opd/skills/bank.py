"""Banks of skills: a JSON file as SkillRL writes it, or a directory of texts with a mapping.

The JSON has `general_skills`, a list, and `task_specific_skills` or `query_type_skills`, a list for
each category; a skill has title, principle and when_to_apply. It may have `common_mistakes`. The
directory has `skill_mapping.json`: `skill_files` names the texts, `task_to_skill` the text of each
kind of task, and `task_keywords` the words by which a task is known. The text `general_skills` is
for every task.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opd.errors import ConfigError, DataError
from megatron_opd.files.json_file import read_json, read_key

MAPPING = "skill_mapping.json"
GENERAL = "general_skills"
_CATEGORIES = ("task_specific_skills", "query_type_skills")


@dataclass(frozen=True)
class Category:
    """The skills of some kinds of tasks."""

    name: str
    text: str  # without the general skills
    count: int  # of its skills
    task_types: tuple[str, ...] = ()  # kinds of tasks that it is for
    keywords: tuple[str, ...] = ()  # words of tasks that it is for


@dataclass(frozen=True)
class Bank:
    """Texts for every task, and texts for those of a category."""

    path: str
    general: str  # "" where it has none
    general_count: int
    categories: tuple[Category, ...]

    def text_of(self, categories: Sequence[Category]) -> str:
        """What a task of some categories gets: the general text, and theirs."""
        texts = [self.general, *(category.text for category in categories)]
        return "\n\n".join(text for text in texts if text)


def load_bank(path: str | Path) -> Bank:
    """The bank in a file or a directory. Raises ConfigError naming file and key."""
    path = Path(path)
    try:
        bank = _of_directory(path) if path.is_dir() else _of_json(path)
    except FileNotFoundError:
        missing = path / MAPPING if path.is_dir() else path
        raise ConfigError(
            f"skills.bank: there is no {missing}; give a .json bank, or a directory with {MAPPING}"
        ) from None
    except DataError as error:
        raise ConfigError(f"skills.bank: {error}") from None
    if not bank.general and not bank.categories:
        raise ConfigError(f"skills.bank: {path} has no skills; write some, or remove skills")
    return bank


# --------------------------------------------------------------------------------------------- JSON
def _of_json(path: Path) -> Bank:
    stored = read_json(path)
    spelled = [key for key in _CATEGORIES if key in stored]
    if GENERAL not in stored and not spelled:
        raise DataError(f"{path}: no key {GENERAL}, {' or '.join(_CATEGORIES)}: it is no bank")
    general = _skills(stored, GENERAL, path)
    mistakes = _mistakes(stored, path)
    sections = [_section("GENERAL SKILLS", general), _section("COMMON MISTAKES", mistakes)]
    categories = []
    for key in spelled:
        lists = read_key(stored, key, dict[str, list[dict[str, Any]]], path)
        for name in lists:
            lines = _skills(lists, name, path, within=f"{key}.")
            if lines:
                text = _section(f"TASK: {name}", lines)
                categories.append(Category(name, text, len(lines), task_types=(name,)))
    return Bank(
        str(path), "\n\n".join(filter(None, sections)), len(general) + len(mistakes),
        tuple(categories),
    )  # fmt: skip


def _skills(stored: Mapping[str, Any], key: str, path: Path, within: str = "") -> list[str]:
    """A line for each skill of a list."""
    lines = []
    for number, skill in enumerate(read_key(stored, key, list[dict[str, Any]], path, [])):
        place = f"{within}{key}[{number}]"
        title, principle = (_text(skill, name, place, path) for name in ("title", "principle"))
        when = _text(skill, "when_to_apply", place, path, default="")
        lines.append(f"{title}: {principle}" + (f" When to apply: {when}" if when else ""))
    return lines


def _mistakes(stored: Mapping[str, Any], path: Path) -> list[str]:
    lines = []
    key = "common_mistakes"
    for number, mistake in enumerate(read_key(stored, key, list[dict[str, Any]], path, [])):
        place = f"{key}[{number}]"
        what = _text(mistake, "description", place, path)
        remedy = _text(mistake, "how_to_avoid", place, path, default="")
        lines.append(f"{what} {remedy}".strip())
    return lines


def _text(
    skill: Mapping[str, Any], name: str, place: str, path: Path, default: str | None = None
) -> str:
    value = skill.get(name, default)
    if not isinstance(value, str) or (default is None and not value.strip()):
        raise DataError(f"{path}: {place}.{name} must be a text; write it there")
    return value.strip()


def _section(title: str, lines: Sequence[str]) -> str:
    numbered = [f"{number}. {line}" for number, line in enumerate(lines, start=1)]
    return "\n\n".join([f"### {title} ###", *numbered]) if lines else ""


# ---------------------------------------------------------------------------------------- directory
def _of_directory(directory: Path) -> Bank:
    path = directory / MAPPING
    mapping = read_json(path)
    files = read_key(mapping, "skill_files", dict[str, str], path)
    texts = {name: _file(directory / file, name, path) for name, file in files.items()}
    skill_of = read_key(mapping, "task_to_skill", dict[str, str], path, {})
    keywords_of = read_key(mapping, "task_keywords", dict[str, list[str]], path, {})
    for kind, skill in skill_of.items():
        _check_named(skill, texts, f"task_to_skill.{kind}", path)
    for kind in keywords_of:
        _check_named(skill_of.get(kind, kind), texts, f"task_keywords.{kind}", path)
    general = texts.pop(GENERAL, "")
    categories = []
    for name, text in texts.items():
        kinds = [kind for kind, skill in skill_of.items() if skill == name]
        named = [kind for kind in keywords_of if skill_of.get(kind, kind) == name]
        keywords = [word.lower() for kind in named for word in keywords_of[kind]]
        categories.append(Category(name, text, _count(text), tuple(kinds), tuple(keywords)))
    return Bank(str(directory), general, _count(general), tuple(categories))


def _file(file: Path, name: str, mapping: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        cause = getattr(error, "strerror", None) or "it is no text in UTF-8"
        raise DataError(f"{mapping}: skill_files.{name}: cannot read {file} ({cause})") from None
    if not text:
        raise DataError(f"{mapping}: skill_files.{name}: {file} is empty; write its skills there")
    return text


def _check_named(skill: str, texts: Mapping[str, str], key: str, path: Path) -> None:
    if skill not in texts:
        raise DataError(f"{path}: {key}: {skill!r} is not among skill_files; add it there")


def _count(text: str) -> int:
    """The numbered or listed lines of a text; a text without any is one skill."""
    starts = [line.lstrip() for line in text.splitlines()]
    listed = [line for line in starts if line[:1] in ("-", "*") or line.split(".")[0].isdigit()]
    return len(listed) or int(bool(text))
