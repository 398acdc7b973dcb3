"""The commands in the pages: all are parsed, and those that are cheap are run."""

import json
import re
import shlex
from pathlib import Path

import pytest

from megatron_opd.cli import main as cli
from megatron_opd.cli.arguments import parse
from tests.unit.tiny_model_files import write_model

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# What a shell would act on, and "..." that stands for more.
_SHELL = re.compile(r"\s(?:&&|\||>|;|\.\.\.)(?:\s.*)?$")

_INLINE = r"`(?:\.venv/bin/)?megatron-opd ([^\s`]+\s[^`]+)`"


def commands_of(page: Path) -> list[str]:
    """The commands of a page's blocks, fenced or indented, without their comments, and those
    between backticks in its text that have arguments."""
    text = page.read_text().replace("\\\n", " ")
    lines = re.findall(
        r"(?m)^ *(?:\$ )?(?:\.venv/bin/)?megatron-opd (.+)$", "\n".join(_blocks(text))
    )
    prose = re.sub(r"(?ms)^ *```.*?^ *```", "", text)
    lines += [" ".join(line.split()) for line in re.findall(_INLINE, prose)]
    return [_SHELL.sub("", re.sub(r"\s#.*", "", line)).strip() for line in lines]


def _blocks(text: str) -> list[str]:
    fenced = re.findall(r"(?ms)^ *```[a-z]*\n(.*?)^ *```", text)
    return fenced + re.findall(r"(?m)^    \S.*$", re.sub(r"(?ms)^ *```.*?^ *```", "", text))


def is_usage(command: str) -> bool:
    """True where brackets or bars say what may stand there, as in `--gpu a100|h800`."""
    return bool(re.search(r"\[[^=]*\]|\w\|\w|--\w+ N\b", command))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_is_parsed(page: Path) -> None:
    for command in commands_of(page):
        if is_usage(command):
            continue
        try:
            parse(shlex.split(command))
        except SystemExit:
            pytest.fail(f"{page.relative_to(ROOT)}: megatron-opd {command}: not understood")


def test_the_commands_are_seen() -> None:
    by_page = {str(page.relative_to(ROOT)): commands_of(page) for page in PAGES}
    assert by_page["README.md"][0] == "recipes"
    assert "check my/recipe.yaml" in by_page["docs/tutorial.md"]
    assert "status runs/tgpo_qwen25_math_7b" in by_page["docs/cluster.md"]
    assert sum(len(commands) for commands in by_page.values()) > 60


def test_cheap_commands_of_the_pages_run(capsys: pytest.CaptureFixture[str]) -> None:
    cheap = {
        command
        for page in PAGES
        for command in commands_of(page)
        if command.split()[0] in ("recipes", "show") and "RECIPE" not in command
    }
    assert len(cheap) > 5
    for command in sorted(cheap):
        assert cli.main(shlex.split(command)) == 0, command
        assert capsys.readouterr().out, command


def test_the_tutorial_is_accepted_with_models_and_data_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`check` reads its recipe, its rows and models of its names: keys, columns and paths are those
    of today."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "tutorial.md").read_text()
    blocks = dict(re.findall(r"(?ms)^```(json|yaml)\n(.*?)^```", page))
    letters = [chr(code) for code in range(32, 127)]
    for name in ("student", "teacher"):
        model = write_model(
            tmp_path / "models" / name,
            tokens=["<eos>", "<unk>", *letters],
            vocab_size=97,
            max_position_embeddings=4096,
        )
        settings = model / "tokenizer_config.json"
        template = "{% for message in messages %}{{ message.content }}{% endfor %}"
        with_template = json.loads(settings.read_text()) | {"chat_template": template}
        settings.write_text(json.dumps(with_template))
    (tmp_path / "my").mkdir()
    for name, last in (("train", "7"), ("heldout", "8")):
        row = blocks["json"].replace("12 + 7", f"12 + {last}")
        (tmp_path / "my" / f"{name}.jsonl").write_text(row)
    (tmp_path / "my" / "recipe.yaml").write_text(blocks["yaml"])
    assert "check my/recipe.yaml" in commands_of(ROOT / "docs" / "tutorial.md")
    assert cli.main(["check", "my/recipe.yaml"]) == 0
    assert "OK: mine: tgpo" in capsys.readouterr().out


def test_links_of_the_readme_lead_somewhere() -> None:
    """README's links lead to files; `make site` checks the links of docs/."""
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text())
    assert len(links) > 20
    assert [link for link in links if not (ROOT / link).exists()] == []
