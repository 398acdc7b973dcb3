"""`megatron-opd init`: the recipe that it writes, what it asks, and what it refuses."""

import io
import json
from pathlib import Path

import pytest

from megatron_opd.cli import main as cli
from megatron_opd.drafting.answers import Answers, complete, recipe_file
from megatron_opd.drafting.draft import draft
from megatron_opd.drafting.material import look
from megatron_opd.errors import ConfigError
from megatron_opd.planning.plan import make_plan
from megatron_opd.recipe.load import load_config
from tests.unit.tiny_model_files import write_model

ROWS = [{"problem": f"{i}+1=", "answer": str(i + 1)} for i in range(40)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def write_rows(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path.name


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with two models and data; nobody sits at a terminal."""
    write_model(tmp_path / "student")
    write_model(tmp_path / "teacher", max_position_embeddings=48)
    write_rows(tmp_path / "mine.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    return tmp_path


def options(**changes: str | None) -> list[str]:
    given = {"student": "student", "teacher": "teacher", "data": "mine.jsonl"}
    given |= {"gpus": "2", "gpu": "cpu"}
    pairs = [(key, value) for key, value in (given | changes).items() if value is not None]
    return [word for key, value in pairs for word in (f"--{key}", value)]


def test_check_and_plan_accept_what_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(folder / "held out.jsonl", ROWS[:5])
    assert cli.main(["init", "mine", *options(heldout="held out.jsonl")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("wrote recipes/mine.yaml: tgpo on 2 x cpu")
    for line in out.splitlines()[1:]:
        if "train" not in line:
            assert cli.main(line.split()[1:]) == 0
    config = load_config("mine")
    assert config.max_sequence_length <= 48  # the teacher's positions, of which there are fewer
    assert config.data.template.kind == "raw"
    text = (folder / "recipes" / "mine.yaml").read_text()
    assert "# 40 rows, 40 with an answer" in text
    assert "half of the models' positions; the longest prompt has 5" in text


def test_the_layout_fits_with_room_where_the_default_does_not(folder: Path) -> None:
    answers = Answers("models/Qwen2.5-7B-Instruct", "", "mine.jsonl", "", 4, "a100")
    drafted = draft("seven", answers, look(answers))
    config = drafted.config
    assert str(config.student.layout) != "TP1"
    plan = make_plan(config, gpus=4, gpu="a100", gpus_per_node=8)
    assert plan.fits
    assert plan.own.peak <= 0.95 * plan.case.hardware.limit


def test_models_that_fit_nowhere_are_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = options(student="models/Qwen2.5-7B-Instruct", teacher="", gpus="1", gpu="a100")
    assert cli.main(["init", "large", *large]) == 2
    assert "no layout of these models fits 1 x a100" in capsys.readouterr().err
    assert not Path("recipes").exists()


@pytest.mark.parametrize(
    ("teacher", "answers", "method"),
    [("teacher", 40, "tgpo"), ("teacher", 0, "opd"), ("", 40, "grpo"), ("", 30, "grpo")],
)
def test_the_method_follows_from_what_there_is(
    folder: Path, teacher: str, answers: int, method: str
) -> None:
    rows = [row if i < answers else {"problem": row["problem"]} for i, row in enumerate(ROWS)]
    write_rows(folder / "some.jsonl", rows)
    assert cli.main(["init", "mine", *options(teacher=teacher, data="some.jsonl")]) == 0
    config = load_config("mine")
    assert config.method.name == method
    assert (config.data.bad_rows == "drop") == (0 < answers < 40)


def test_odd_names_are_quoted(folder: Path) -> None:
    odd = write_rows(folder / 'my: "data" # 1.jsonl', ROWS)
    assert cli.main(["init", "1e5", *options(data=odd)]) == 0
    config = load_config("1e5")
    assert (config.name, config.data.train) == ("1e5", odd)


def test_nothing_is_overwritten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = folder / "recipes" / "mine.yaml"
    own.parent.mkdir()
    own.write_text("# mine\n")
    assert cli.main(["init", "mine", *options()]) == 2
    assert own.read_text() == "# mine\n"
    assert cli.main(["init", "demo", *options()]) == 2  # would hide the packaged one
    assert capsys.readouterr().err.count("choose another name") == 2


@pytest.mark.parametrize("name", ["", "a/b", "../a", ".a", "-a", "a b", "a.yaml", "ä", "a\nb"])
def test_names_of_recipes(name: str) -> None:
    with pytest.raises(ConfigError, match="is no name of a recipe"):
        recipe_file(name)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"student": None}, "--student: missing, and there is no terminal"),
        ({"data": None}, "--data: missing, and there is no terminal"),
        ({"gpus": None}, "--gpus: missing"),
        ({"gpu": None}, "--gpu: missing"),
        ({"student": ""}, "--student: is empty"),
        ({"student": "nowhere"}, "nowhere is no directory"),
        ({"teacher": "nowhere"}, "nowhere is no directory"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"heldout": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"data": "a\nb.jsonl"}, "cannot be printed"),
        ({"gpu": "b9"}, "--gpu: "),
        ({"gpus": "99999"}, "--gpus: '99999' is not a number from 1 to 4096"),
        ({"method": "no_such"}, "--method: "),
        ({"data": "empty.jsonl"}, "empty.jsonl"),
        ({"data": "unanswered.jsonl", "teacher": ""}, "nothing to learn from"),
        ({"method": "tgpo", "teacher": ""}, "teacher"),
    ],
)
def test_a_wrong_option_is_one_line_and_writes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, str | None], words: str
) -> None:
    (folder / "empty.jsonl").touch()
    write_rows(folder / "unanswered.jsonl", [{"problem": "1+1="}])
    assert cli.main(["init", "mine", *options(**changes)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert words in lines[0]
    assert not Path("recipes").exists()


def test_a_wrong_answer_is_asked_for_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = ["nowhere", "student", "", "", "mine.jsonl", "", "0", "two", "2", "cpu"]
    monkeypatch.setattr("sys.stdin", Terminal("".join(f"{line}\n" for line in typed)))
    expected = Answers("student", "", "mine.jsonl", "", 2, "cpu")
    assert complete(Answers()) == expected
    out = capsys.readouterr().out
    assert "nowhere is no directory" in out
    assert "'two' is not a number from 1 to 4096" in out
    assert complete(expected) == expected  # nothing is left to ask


def test_an_end_of_the_answers_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", Terminal("student\n"))
    with pytest.raises(ConfigError, match="--teacher: was not answered"):
        complete(Answers())
