"""Whatever a recipe holds: `check` says OK, or one line with exit code 2. The faults are drawn from
fixed seeds."""

import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from ruamel.yaml import YAML

from megatron_opd.cli.main import main
from megatron_opd.recipe.load import dump_config, load_config
from megatron_opd.suites.table import SUITES
from tests.unit.published_suites import write_suite
from tests.unit.recipe_mutations import BOMB, TEXTS, mangle, mutate, whole_recipes
from tests.unit.tiny_model_files import write_model, write_recipe

PER_SEED = 100
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))]


@pytest.fixture(scope="module", autouse=True)
def offline() -> Iterator[None]:
    """No fault sends a suite's data to be looked for on the Hub."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and data that all packaged recipes can be checked with."""
    folder = tmp_path_factory.mktemp("fuzz")
    for role in ("student", "teacher"):
        model = write_model(
            folder / role, vocab_size=80, max_position_embeddings=2**17, num_key_value_heads=4
        )
        settings = json.loads((model / "tokenizer_config.json").read_text())
        settings["chat_template"] = "{{ messages[-1]['content'] }}"
        (model / "tokenizer_config.json").write_text(json.dumps(settings))
    rows = ({"problem": f"{i}+1=", "answer": f"{i + 1}", "response": f"{i}"} for i in range(8))
    skill = {"title": "Look", "principle": "Look first.", "when_to_apply": "Always."}
    bank = {"general_skills": [{"skill_id": "gen_001", **skill}], "task_specific_skills": {}}
    (folder / "bank.json").write_text(json.dumps(bank))
    for name in SUITES:
        write_suite(name, folder / "suites" / name)
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def recipes(folder: Path) -> list[dict[str, Any]]:
    """The packaged recipes as they are written, and resolved, with every key; all of them pass."""
    paths = {name: str(folder / name) for name in ("student", "teacher")}
    written = whole_recipes(
        paths
        | {
            "data": str(folder / "data.jsonl"),
            "bank": str(folder / "bank.json"),
            "suites": str(folder / "suites"),
            "run_dir": str(folder / "run"),
        }
    )
    resolved, file = [], folder / "whole.yaml"
    for tree in written:
        file.write_text(as_text(tree))
        assert main(["check", str(file)]) == 0
        resolved.append(YAML(typ="safe", pure=True).load(dump_config(load_config(str(file)))))
    return written + resolved


def as_text(tree: dict[str, Any]) -> str:
    text = io.StringIO()
    YAML(typ="safe", pure=True).dump(tree, text)
    return text.getvalue()


def verdict(file: Path, text: str | bytes, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and error line of `check`; warnings are let be."""
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    capsys.readouterr()
    code = main(["check", str(file)])
    lines = [line for line in capsys.readouterr().err.splitlines() if ": warning: " not in line]
    assert len(lines) == (0 if code == 0 else 1), lines
    return code, "".join(lines)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_recipe_with_any_fault_is_one_line(
    seed: int, recipes: list[dict[str, Any]], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng, refused = random.Random(f"recipes {seed}"), 0
    for number in range(PER_SEED):
        recipe = rng.choice(recipes)
        text = as_text(mutate(recipe, rng)) if rng.random() < 0.75 else mangle(as_text(recipe), rng)
        # stays there where the next line fails
        (folder / "fuzzed.yaml").write_text(text, errors="surrogatepass")
        code, line = verdict(folder / "fuzzed.yaml", text, capsys)
        assert code in (0, 2), f"recipe {number} of seed {seed}: {line}"
        refused += code == 2
    assert PER_SEED / 2 < refused < PER_SEED  # most faults matter, and some do not


@pytest.mark.parametrize("text", TEXTS)
def test_a_value_of_any_text_is_one_line(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path)
    for key in ("seed", "method.policy.weight", "data", "name"):
        assert main(["show", str(recipe), f"{key}={text}"]) in (0, 2)
        assert len(capsys.readouterr().err.splitlines()) <= 1


NO_RECIPES = {
    "nothing": ("", "must be a mapping of keys"),
    "blanks": (" \n\n", "must be a mapping of keys"),
    "a comment": ("# nothing\n", "must be a mapping of keys"),
    "a list": ("- a\n", "must be a mapping of keys"),
    "a text": ("recipe", "must be a mapping of keys"),
    "two documents": ("a: 1\n---\nb: 1\n", "line 2: but found another document"),
    "tabs": ("a:\n\tb: 1\n", "line 2: found character '\\t'"),
    "a key twice": ("name: a\nname: b\n", 'line 2: found duplicate key "name"'),
    "a Python object": (
        "name: !!python/object/apply:os.system [x]\n",
        "could not determine a constructor",
    ),
    "no such date": ("name: 2026-99-99\n", "not valid YAML (ValueError: month must be in 1..12)"),
    "no number": ("name: !!int a\n", "not valid YAML (ValueError"),
    "digits": (f"name: {'9' * 5000}\n", "not valid YAML (ValueError"),
    "depth": (f"name: {'[' * 500}", "not valid YAML (RecursionError"),
    "itself": (
        "name: &a [*a]\n",
        "has more than 10000 values, or one within itself; write it without anchors",
    ),
    "a bomb": (BOMB, "has more than 10000 values, or one within itself"),
    "no UTF-8": (b"name: \xff\n", "cannot be read"),
    "a null": (b"name: a\0b\n", "special characters are not allowed"),
}


@pytest.mark.parametrize("what", NO_RECIPES)
def test_what_is_no_recipe_names_the_file(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, problem = NO_RECIPES[what]
    code, line = verdict(tmp_path / "recipe.yaml", text, capsys)
    assert code == 2
    assert line.startswith(f"megatron-opd: error: {tmp_path / 'recipe.yaml'}: ")
    assert problem in line


WRONG = {
    "seed=-1": "must be greater than or equal to 0",
    "seed=4294967296": "must be less than or equal to 4294967295",
    "seed=1.0": "must be an integer",
    "num_steps=9999999999": "must be less than or equal to 2147483647",
    "num_steps=1e3": "must be an integer",
    "num_steps='4'": "must be an integer",
    "num_steps=true": "must be an integer",
    "rollout.num_prompts=[4]": "must be an integer",
    "rollout.temperature=0.009": "must be greater than or equal to 0.01",
    "rollout.temperature=2.1": "must be less than or equal to 2",
    "rollout.temperature=.nan": "must be",
    "rollout.kv_cache_gib=1e300": "must be less than or equal to 1048576",
    "reward.timeout_seconds=.inf": "must be",
    "eval.temperature=0.001": "eval.temperature: 0.001 must be 0 (greedy), or from 0.01 to 2",
    "eval.temperature=3": "eval.temperature: 3 must be 0 (greedy), or from 0.01 to 2",
    "train.optimizer.lr='1e-3'": "must be a number",
    "train.optimizer.lr=-.inf": "must be",
    "method={name: m, terms: {a: {kind: [topk]}}}": "method.a.kind: unknown kind; "
    "known: policy_gradient",
    "method.policy.ratio={kind: {}}": "kind: unknown kind; known: old",
    "method.policy.ratio={kind: 1}": "kind: unknown kind; known: old",
    "method={name: m, terms: {a: {kind: topk, k: 17}}}": "method.a.k: 17 is more than "
    "the 16 tokens of the vocabulary",
    "method=[grpo]": "must be a name or a mapping",
    "method={name: [grpo]}": "unknown method",
    "method.policy={}": "missing",
    "teacher=[]": "must be a mapping of keys",
    f"student.path={'x' * 5000}": "File name too long; name another path",
    f"run_dir={'x' * 5000}": "File name too long; name another path",
    "student.path=/dev/null": "/dev/null: no such model directory",
    'run_dir="a\\0b"': "run_dir: 'a\\x00b' holds a null character",
    'name="\\ud800"': "must be text without halves of characters",
    "run_dir=/dev/null/run": "run_dir: cannot write /dev/null/run (Not a directory)",
}


@pytest.mark.parametrize("override", WRONG, ids=[text[:60] for text in WRONG])
def test_wrong_values_are_one_line(
    override: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "train.jsonl"
    recipe = write_recipe(
        tmp_path, data={"train": str(data), "heldout": str(data), "template": {"kind": "raw"}}
    )
    assert main(["check", str(recipe), "eval.every=1", override]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if ": warning: " not in line)
    assert WRONG[override] in line


def test_recipes_that_are_no_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for recipe, problem in (
        (str(tmp_path), "a directory without config.yaml; give a recipe or a run directory"),
        ("/proc/self/mem", "cannot be read"),
        ("x" * 5000, "File name too long"),
        (f"{tmp_path}/a\nb.yaml", "no such file"),
    ):
        assert main(["check", recipe]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert problem in line
