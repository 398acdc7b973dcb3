"""Small banks of skills in both formats."""

import json
from pathlib import Path

GENERAL = "### GENERAL SKILLS ###\n\n1. Look first: open before you judge."
HEAT = "### TASK: heat ###\n\n1. Heat it: use the microwave.\n\n2. Then carry it."


def write_directory(directory: Path, **changes: object) -> Path:
    """ALFWorld's kinds, cut down, with the mapping of SDAR's released code."""
    directory.mkdir(parents=True)
    texts = {"general_skills": GENERAL, "pick_and_place": "1. Put it.", "heat": HEAT}
    texts["look_at_obj_in_light"] = "1. Use the desklamp."
    for name, text in texts.items():
        (directory / f"{name}.md").write_text(f"{text}\n")
    mapping = {
        "skill_files": {name: f"{name}.md" for name in texts},
        "task_to_skill": {
            "pick_and_place": "pick_and_place",
            "pick_two_obj_and_place": "pick_and_place",
            "look_at_obj_in_light": "look_at_obj_in_light",
            "pick_heat_then_place_in_recep": "heat",
        },
        "task_keywords": {
            "look_at_obj_in_light": ["look at", "light"],
            "pick_heat_then_place_in_recep": ["heat"],
            "pick_and_place": ["put", "hat"],
        },
    }
    (directory / "skill_mapping.json").write_text(json.dumps(mapping | changes))
    return directory


def write_words(directory: Path, **texts: str) -> Path:
    """A text for every word, found by it."""
    directory.mkdir()
    for name, text in texts.items():
        (directory / f"{name}.md").write_text(text)
    mapping = {
        "skill_files": {name: f"{name}.md" for name in texts},
        "task_keywords": {name: [name] for name in texts},
    }
    (directory / "skill_mapping.json").write_text(json.dumps(mapping))
    return directory


def skill(title: str) -> dict[str, str]:
    return {
        "skill_id": "x_001",
        "title": title,
        "principle": f"Do {title}.",
        "when_to_apply": "Always.",
    }


def write_json(path: Path, categories_key: str = "task_specific_skills", **changes: object) -> Path:
    bank = {
        "general_skills": [skill("Look"), skill("Wait")],
        categories_key: {
            "pick_and_place": [skill("Carry")],
            "heat": [skill("Heat"), skill("Open")],
            "clean": [skill("Rinse")],
        },
        "common_mistakes": [
            {"mistake_id": "e_1", "description": "Twice the same.", "how_to_avoid": "Change it."}
        ],
        "metadata": {"source": "a test"},
    }
    path.write_text(json.dumps(bank | changes))
    return path
