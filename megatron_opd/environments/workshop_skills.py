"""What there is to know of a workshop, as a bank of skills: right, or partly wrong.

    python -m megatron_opd.environments.workshop_skills runs/skills --wrong 0.25

A directory gets a text for every word of a task, found by keyword: `mug in drawer .` and
`chill with fridge .`. A name that ends in .json gets SkillRL's format: where everything is kept, as
general skills, and the tool of a job in a category of its own.
"""

import argparse
import json
import random
from pathlib import Path

from megatron_opd.environments.workshop import ITEMS, Rules


def lines_of(rules: Rules) -> dict[str, str]:
    """A line for every thing and every job, by its word."""
    places = {item: f"{item} in {place} ." for item, place in rules.place_of.items()}
    return places | {job: f"{job} with {tool} ." for job, tool in rules.tool_for.items()}


def partly_wrong(rules: Rules, share: float, seed: int) -> Rules:
    """The rules with a share of every table's entries replaced by other words of the table."""
    draw = random.Random(f"workshop skills {seed}")

    def spoilt(table: dict[str, str]) -> dict[str, str]:
        wrong = draw.sample(sorted(table), round(share * len(table)))
        others = {key: sorted(set(table.values()) - {table[key]}) for key in wrong}
        return table | {key: draw.choice(others[key]) for key in wrong}

    return Rules(spoilt(rules.place_of), spoilt(rules.tool_for))


def write_bank(path: Path, rules: Rules) -> None:
    """Writes a bank: SkillRL's JSON, or a directory with a mapping."""
    if path.suffix == ".json":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_as_json(rules), indent=1) + "\n", encoding="utf-8")
        return
    path.mkdir(parents=True, exist_ok=True)
    lines = lines_of(rules)
    for word, line in lines.items():
        (path / f"{word}.md").write_text(line + "\n", encoding="utf-8")
    mapping = {
        "skill_files": {word: f"{word}.md" for word in lines},
        "task_keywords": {word: [word] for word in lines},
    }
    (path / "skill_mapping.json").write_text(json.dumps(mapping, indent=1) + "\n", encoding="utf-8")


def _as_json(rules: Rules) -> dict[str, object]:
    lines = lines_of(rules)

    def skill(word: str, name: str) -> dict[str, str]:
        return {"skill_id": name, "title": word, "principle": lines[word], "when_to_apply": ""}

    general = [skill(item, f"gen_{i:03}") for i, item in enumerate(rules.place_of, start=1)]
    special = {job: [skill(job, f"{job}_001")] for job in rules.tool_for}
    return {"general_skills": general, "task_specific_skills": special, "common_mistakes": []}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a workshop's bank of skills.")
    parser.add_argument("out", type=Path, help="a directory, or a .json file")
    parser.add_argument("--size", type=int, default=len(ITEMS), help="of the world's tables")
    parser.add_argument("--world", type=int, default=0, help="the world's option `seed`")
    parser.add_argument("--wrong", type=float, default=0.0, help="share of wrong entries")
    parser.add_argument("--seed", type=int, default=0, help="of what is wrong")
    arguments = parser.parse_args()
    if not 0 <= arguments.wrong <= 1:
        parser.error(f"--wrong: {arguments.wrong:g} must be from 0 to 1")
    rules = Rules.drawn(arguments.world, arguments.size)
    write_bank(arguments.out, partly_wrong(rules, arguments.wrong, arguments.seed))


if __name__ == "__main__":
    main()
