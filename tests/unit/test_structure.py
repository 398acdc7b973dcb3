"""The rules of the folder tree: who may import whom, what stays free of torch, how long a file may be."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megatron_opd"
STATIONS = {"prompts", "rollout", "reward", "teacher", "objective", "train", "refit", "metrics"}
FOUNDATION = {"records", "errors", "manifest", "config", "mcore", "weights"}
MAX_LINES = 300
SOURCES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_parts(source: str, module: str, is_package: bool = False) -> set[str]:
    """Names directly under `megatron_opd` that `source` imports anywhere, relative imports resolved."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module if is_package else module.rpartition(".")[0]
            base = resolve_name("." * node.level + (node.module or ""), package)
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return {name.split(".")[1] for name in names if name.startswith("megatron_opd.")} - {"__version__"}


def forbidden_imports(source: str, module: str, is_package: bool = False) -> set[str]:
    """What a module of a station or of the foundation imports beyond itself and the foundation."""
    own = module.split(".")[1]
    return imported_parts(source, module, is_package) - FOUNDATION - {own}


def guarded_sources() -> list[Path]:
    return [path for path in SOURCES if path.relative_to(PACKAGE).with_suffix("").parts[0] in STATIONS | FOUNDATION]


@pytest.mark.parametrize("path", guarded_sources(), ids=module_name)
def test_stations_and_foundation_import_only_the_foundation(path: Path) -> None:
    forbidden = forbidden_imports(path.read_text(), module_name(path), path.name == "__init__.py")
    assert not forbidden, f"{path} imports {sorted(forbidden)}; allowed: itself and {sorted(FOUNDATION)}"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch\nfrom megatron_opd.contracts.rows import Prompt", set()),
        ("from megatron_opd.trainer.step import run", set()),
        ("from .step import run", set()),
        ("from megatron_opd import __version__", set()),
        ("import megatron_opd.rollout.vllm.engine as engine", {"rollout"}),
        ("from megatron_opd import refit", {"refit"}),
        ("def late():\n    from megatron_opd.verify import rubric", {"reward"}),
        ("from ..teacher import score", {"teacher"}),
        ("from .. import metrics", {"metrics"}),
        ("from megatron_opd.loop import train", {"loop"}),
    ],
)
def test_the_import_check_sees_every_way_to_import(source: str, expected: set[str]) -> None:
    assert forbidden_imports(source, "megatron_opd.trainer.loss") == expected
    assert forbidden_imports(source, "megatron_opd.trainer", is_package=True) == expected


def test_every_station_exists() -> None:
    missing = {name for name in STATIONS | FOUNDATION if not any(path.stem == name for path in PACKAGE.iterdir())}
    assert not missing


def test_what_reads_a_recipe_does_not_import_torch() -> None:
    light = [module_name(path) for path in SOURCES if path.relative_to(PACKAGE).parts[0] == "config"]
    modules = [
        *light,
        "megatron_opd.contracts.rows",
        "megatron_opd.errors",
        "megatron_opd.cli.main",
        "megatron_opd.checks.training",
    ]
    assert {"megatron_opd.recipe.keys", "megatron_opd.recipe.load"} <= set(modules)
    heavy = "{'torch', 'megatron.core', 'transformers', 'vllm'} & set(sys.modules)"
    code = f"import sys, {', '.join(modules)}; sys.exit(', '.join({heavy}) or 0)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_files_are_short_and_named_after_what_they_do(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_LINES, f"{path} has {lines} lines; split it"
    assert path.stem not in {"utils", "util", "helpers", "misc", "common"}, f"{path}: name it after what it does"


def unpickles(tree: ast.AST) -> Iterator[str]:
    """Calls that may run code of whoever wrote a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = ast.unparse(node.func)
            safe = any(each.arg == "weights_only" and ast.unparse(each.value) == "True" for each in node.keywords)
            if name in ("pickle.load", "pickle.loads", "dist_checkpointing.load") or (
                name == "torch.load" and not safe
            ):
                yield name
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "dill", "cloudpickle", "joblib", "marshal"):
            yield node.module


def test_files_are_never_unpickled() -> None:
    """world/channel.py: messages between the processes of one run."""
    bad = {path: sorted(unpickles(ast.parse(path.read_text()))) for path in SOURCES}
    assert {path.name: names for path, names in bad.items() if names} == {"channel.py": ["pickle.loads"]}
    assert list(unpickles(ast.parse("torch.load(path)\ntorch.load(path, weights_only=True)"))) == ["torch.load"]
