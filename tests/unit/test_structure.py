"""The rules of the folder tree: who may import whom, what stays free of torch, how long a file may
be."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megatron_opd"
# From the ground up: a module imports its own folder and those of floors below it.
FLOORS = (
    {"errors", "contracts"},
    {"files", "vocab_parallel", "sandbox", "statistics"},
    {"methods", "architectures", "world"},
    {"recipe", "mcore"},
    {
        "tasks",
        "suites",
        "verify",
        "environments",
        "skills",
        "teacher",
        "objective",
        "metrics",
        "weights",
    },
    {"rollout", "trainer", "refit"},
    {"checks", "report", "conversion", "evaluation"},
    {"runs", "planning", "bench"},
    {"loop"},
    {"start"},
    {"doctor", "cluster", "drafting"},
    {"cli"},
    {"__init__", "__main__"},
)
FLOOR_OF = {folder: number for number, folders in enumerate(FLOORS) for folder in folders}
# What the algorithm goes through. None imports another: `runs` hands them to each other.
STATIONS = {
    "tasks", "suites", "rollout", "verify", "environments", "skills", "teacher", "objective",
    "trainer", "refit", "metrics",
}  # fmt: skip
# Imported by the command line before it is known whether a command needs torch.
WITHOUT_TORCH = {
    "contracts",
    "errors",
    "files",
    "methods",
    "architectures",
    "recipe",
    "checks",
    "tasks",
    "suites",
    "statistics",
    "sandbox",
    "environments",
    "skills",
    "cli",
}
MOST_LOOSE_FILES = 5
MAX_LINES = 300
SOURCES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_parts(source: str, module: str, is_package: bool = False) -> set[str]:
    """Names directly under `megatron_opd` that `source` imports anywhere, relative imports
    resolved."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module if is_package else module.rpartition(".")[0]
            base = resolve_name("." * node.level + (node.module or ""), package)
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return {name.split(".")[1] for name in names if name.startswith("megatron_opd.")} - {
        "__version__"
    }


def forbidden_imports(source: str, module: str, is_package: bool = False) -> set[str]:
    """What a module imports from its own floor or one above, and what a station imports of
    another."""
    own = module.split(".")[1] if "." in module else "__init__"
    others = imported_parts(source, module, is_package) - {own}
    upwards = {part for part in others if FLOOR_OF[part] >= FLOOR_OF[own]}
    return upwards | (others & STATIONS if own in STATIONS else set())


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_modules_import_only_what_is_below_them(path: Path) -> None:
    forbidden = forbidden_imports(path.read_text(), module_name(path), path.name == "__init__.py")
    assert not forbidden, (
        f"{path} imports {sorted(forbidden)}, which are not below it or are stations too; see "
        "FLOORS"
    )


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch\nfrom megatron_opd.contracts.rows import Task", set()),
        ("from megatron_opd.trainer.step import run", set()),
        ("from .step import run", set()),
        ("from megatron_opd import __version__", set()),
        ("from megatron_opd.weights.load import load_hf", set()),
        ("import megatron_opd.rollout.vllm.engine as engine", {"rollout"}),
        ("from megatron_opd import refit", {"refit"}),
        ("def late():\n    from megatron_opd.verify import pool", {"verify"}),
        ("from ..teacher import score", {"teacher"}),
        ("from .. import metrics", {"metrics"}),
        ("from megatron_opd.loop import train", {"loop"}),
    ],
)
def test_the_import_check_sees_every_way_to_import(source: str, expected: set[str]) -> None:
    assert forbidden_imports(source, "megatron_opd.trainer.loss") == expected
    assert forbidden_imports(source, "megatron_opd.trainer", is_package=True) == expected


def test_the_main_path_has_types() -> None:
    """From the rows to the update, `Any` would hide who must do what."""
    folders = ("contracts", "runs", "refit", "teacher", "objective", "evaluation")
    paths = [path for folder in folders for path in (PACKAGE / folder).glob("*.py")]
    paths += (PACKAGE / "rollout").glob("*.py")
    paths += [PACKAGE / name for name in ("loop.py", "start.py", "trainer/step.py")]
    paths += [PACKAGE / "mcore" / f"{name}.py" for name in ("batch", "head", "passes")]
    untyped = [path for path in paths if "Any" in _names(path)]
    assert untyped == [PACKAGE / "evaluation" / "traces.py"]  # what a file says of its origin


def _names(path: Path) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}


@pytest.mark.parametrize("implementation", ["rollout.vllm", "verify.pool"])
def test_an_implementation_is_named_by_the_one_place_that_chooses_it(implementation: str) -> None:
    name = f"megatron_opd.{implementation}"
    own = PACKAGE.joinpath(*implementation.split("."))
    others = [path for path in SOURCES if not path.with_suffix("").is_relative_to(own)]
    naming = [path for path in others if f"from {name}" in path.read_text()]
    assert naming == [PACKAGE / implementation.split(".")[0] / "open.py"]


def test_every_folder_has_its_floor() -> None:
    there = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in SOURCES}
    assert there == set(FLOOR_OF)
    assert len(list(PACKAGE.glob("*.py"))) <= MOST_LOOSE_FILES
    # A folder without one is left out of the wheel.
    assert {path.parent for path in SOURCES} == {
        path.parent for path in PACKAGE.rglob("__init__.py")
    }


def test_what_reads_a_recipe_does_not_import_torch() -> None:
    light = [
        path
        for path in SOURCES
        if path.relative_to(PACKAGE).with_suffix("").parts[0] in WITHOUT_TORCH
    ]
    modules = [*map(module_name, light), "megatron_opd.start"]
    assert {"megatron_opd.recipe.keys", "megatron_opd.cli.commands"} <= set(modules)
    heavy = "{'torch', 'megatron.core', 'transformers', 'vllm'} & set(sys.modules)"
    code = f"import sys, {', '.join(modules)}; sys.exit(', '.join({heavy}) or 0)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_files_are_short_and_named_after_what_they_do(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_LINES, f"{path} has {lines} lines; split it"
    assert path.stem not in {"utils", "util", "helpers", "misc", "common"}, (
        f"{path}: name it after what it does"
    )


def test_no_two_test_files_have_one_name() -> None:
    """pytest refuses to collect them together, which running one of them does not show."""
    names = [path.name for path in (PACKAGE.parent / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def unpickles(tree: ast.AST) -> Iterator[str]:
    """Calls that may run code of whoever wrote a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = ast.unparse(node.func)
            safe = any(
                each.arg == "weights_only" and ast.unparse(each.value) == "True"
                for each in node.keywords
            )
            if name in ("pickle.load", "pickle.loads", "dist_checkpointing.load") or (
                name == "torch.load" and not safe
            ):
                yield name
        if isinstance(node, ast.ImportFrom) and node.module in (
            "pickle",
            "dill",
            "cloudpickle",
            "joblib",
            "marshal",
        ):
            yield node.module


def test_files_are_never_unpickled() -> None:
    """world/channel.py: messages between the processes of one run."""
    bad = {path: sorted(unpickles(ast.parse(path.read_text()))) for path in SOURCES}
    assert {path.name: names for path, names in bad.items() if names} == {
        "channel.py": ["pickle.loads"]
    }
    assert list(unpickles(ast.parse("torch.load(path)\ntorch.load(path, weights_only=True)"))) == [
        "torch.load"
    ]
