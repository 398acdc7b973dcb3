"""The wheel, in an environment that has its requirements and nothing of this checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import pytest

from megatron_opd import __version__

ROOT = Path(__file__).parents[2]
SOURCES = ("megatron_opd", "recipes", "slurm")
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
WITHOUT_CHECKOUT = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

Run = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = pytest.mark.slow


def pip(*arguments: str, cwd: Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, cwd=cwd, env=WITHOUT_CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: an older build/ of the checkout would bring files that are gone."""
    copy = tmp_path_factory.mktemp("copy")
    for name in SOURCES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    out = tmp_path_factory.mktemp("wheels")
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(out), ".", cwd=copy)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def run(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a program of an environment that the wheel was installed into, in an empty folder.

    A path in a .pth file shows the packages of this environment; the .pth files that lie there,
    among them the one that names this checkout, are not read.
    """
    home = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    paths = {"base": str(home), "platbase": str(home)}
    site = Path(sysconfig.get_path("purelib", "venv", paths))
    (site / "beside.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    python = ("--python", str(home / "bin" / "python"))
    pip(*python, "install", "--no-deps", "--no-index", "--no-compile", str(wheel), cwd=home)
    empty = tmp_path_factory.mktemp("empty")

    def run(program: str, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [home / "bin" / program, *arguments]
        done = subprocess.run(
            command, cwd=empty, env=WITHOUT_CHECKOUT, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == code, done.stderr
        return done

    where = "import megatron_opd; print(megatron_opd.__file__)"
    assert Path(run("python", "-c", where).stdout.strip()).is_relative_to(home)
    return run


def test_the_wheel_has_every_file_of_the_package(wheel: Path) -> None:
    with ZipFile(wheel) as opened:
        inside = {name for name in opened.namelist() if name.startswith("megatron_opd/")}
    package = ROOT / "megatron_opd"
    files = {path for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    expected = {str(path.relative_to(ROOT)) for path in files}
    expected |= {
        f"megatron_opd/{path.relative_to(ROOT)}" for path in ROOT.glob("recipes/**/*.yaml")
    }
    expected |= {f"megatron_opd/{path.relative_to(ROOT)}" for path in ROOT.glob("slurm/*.yaml")}
    assert inside == expected | {"megatron_opd/slurm/submit.py"}
    assert "megatron_opd/py.typed" in inside


def test_recipes_are_listed_and_shown_outside_a_checkout(run: Run) -> None:
    listed = {line.split()[0] for line in run("megatron-opd", "recipes").stdout.splitlines()[1:]}
    folder = ROOT / "recipes"
    assert listed == {
        str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml")
    }
    assert "tgpo" in run("megatron-opd", "show", "demo").stdout
    assert run("megatron-opd", "--version").stdout == f"megatron-opd {__version__}\n"


def test_check_and_launch_say_in_one_line_what_is_missing(run: Run) -> None:
    for arguments, words in (
        (("check", "demo"), "runs/demo_student_start"),
        (("launch", "demo", "--cluster", "nowhere"), "a100, cpu-test, h800"),
        (("launch", "demo", "--cluster", "cpu-test"), "pip install nemo-run"),
    ):
        lines = run("megatron-opd", *arguments, code=2).stderr.splitlines()
        assert len(lines) == 1
        assert words in lines[0]


def test_a_plan_outside_a_checkout(run: Run) -> None:
    planned = run("megatron-opd", "plan", "tgpo_qwen25_math_7b", "--gpus", "8", "--gpu", "a100")
    assert "a100" in planned.stdout.lower()
    assert not planned.stderr
