"""Every suite: read from its published format, asked, and right and wrong answers graded."""

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_opd.contracts.suites import Answer, Grader, Question
from megatron_opd.errors import ConfigError, DataError
from megatron_opd.recipe.rewards import RewardConfig
from megatron_opd.suites.contamination import contamination
from megatron_opd.suites.listing import listed_suites
from megatron_opd.suites.open import OpenSuite, open_suites
from megatron_opd.suites.protocols import PRESETS, protocol_of
from megatron_opd.suites.table import GROUPS, SUITES
from megatron_opd.verify.graders import instructions
from megatron_opd.verify.graders.code import refusal_of
from megatron_opd.verify.graders.maths import Judges, MathGrader
from megatron_opd.verify.graders.open import open_graders
from megatron_opd.verify.open import open_judges
from tests.unit.published_suites import (
    CHOICE,
    MATHS,
    PROGRAMS,
    SUM,
    WRITING,
    replies,
    write_suite,
)

IN_MATHS = [name for name, suite in SUITES.items() if suite.grader == "math"]
IN_CHOICE = [name for name, suite in SUITES.items() if suite.grader == "choice"]


def opened(name: str, folder: Path, **options: object) -> OpenSuite:
    write_suite(name, folder)
    options = {"warn": lambda line: None, **options}
    [suite] = open_suites([name], data={name: str(folder)}, **options)  # type: ignore[arg-type]
    return suite


@pytest.fixture(scope="module")
def judges() -> Iterator[dict[str, Judges]]:
    """The workers of mathematics, which take seconds to start."""
    with contextlib.ExitStack() as closing:
        names = {"math": "items", "math_legacy": "legacy"}
        yield {name: open_judges(RewardConfig(), judge, closing) for name, judge in names.items()}


def graded(grader: Grader, suite: OpenSuite, truncated: bool = False) -> list[tuple[str, str]]:
    """The reasons of a right and a wrong answer to every question."""
    asked = [suite.asked(question, 0) for question in suite.questions]
    pairs = [[Answer(one, text, truncated) for text in replies(one)] for one in asked]
    verdicts = grader.grade([answer for pair in pairs for answer in pair])
    reasons = [verdict.reason for verdict in verdicts]
    return list(zip(reasons[::2], reasons[1::2], strict=True))


def grader_of(suite: OpenSuite, closing: contextlib.ExitStack) -> Grader:
    return open_graders({"": suite.protocol}, RewardConfig(), closing)[""]


@pytest.mark.parametrize("name", IN_MATHS)
def test_suites_of_mathematics(name: str, tmp_path: Path, judges: dict[str, Judges]) -> None:
    suite = opened(name, tmp_path)
    assert len(suite.questions) == (4 if name == "amc23" else 5)
    grader = MathGrader(judges["math"], suite.protocol.grading)
    assert {right for right, _ in graded(grader, suite)} == {"correct"}
    assert {wrong for _, wrong in graded(grader, suite)} <= {"wrong", "no_answer"}
    [word] = {wrong for _, wrong in graded(grader, suite, truncated=True)} - {"wrong"} or {""}
    assert word in ("", "truncated")
    assert {"math-verify", "rules"} <= grader.versions.keys()


def test_minerva_as_graded_in_the_papers(tmp_path: Path, judges: dict[str, Judges]) -> None:
    """A power of ten for a gold answer with an e is wrong, by what 58 of the 272 lose."""
    suite = opened("minerva_legacy", tmp_path)
    grader = MathGrader(judges["math_legacy"], suite.protocol.grading)
    reasons = [right for right, _ in graded(grader, suite)]
    assert reasons == ["wrong", "wrong", "wrong", "correct", "correct"]
    digits = ["4.5e33", "0.0024", "1.7322", "1", "2"]
    answers = [rf"\boxed{{{text}}}" for text in digits]
    asked = [suite.asked(question, 0) for question in suite.questions]
    given = [Answer(one, text, False) for one, text in zip(asked, answers, strict=True)]
    assert [verdict.reason for verdict in grader.grade(given)][:3] == ["correct"] * 3


@pytest.mark.parametrize("name", IN_CHOICE)
def test_suites_of_choice(name: str, tmp_path: Path) -> None:
    suite = opened(name, tmp_path)
    assert len(suite.questions) == (4 if name == "mmlu_redux" else 5)
    with contextlib.ExitStack() as closing:
        grader = grader_of(suite, closing)
    golds = [question.options["ABCDEFGHIJ".index(question.gold)] for question in suite.questions]
    if name == "mmlu_redux_all":
        assert [q.group for q in suite.questions] == ["anatomy"] * 3 + ["virology"] * 2
    assert set(golds) <= {options[0] for options in CHOICE.values()}
    assert graded(grader, suite) == [("correct", "wrong")] * len(golds)
    [question, *_] = suite.questions
    asked = suite.asked(question, 3)
    assert asked.question.options[asked.order[asked.gold_place]] == golds[0]
    assert f"{asked.gold}. {golds[0]}" in asked.words
    cut = grader.grade([Answer(asked, "Well, I", True), Answer(asked, "A or B", False)])
    assert [verdict.reason for verdict in cut] == ["truncated", "no_answer"]


def test_the_order_of_options_depends_on_words_seed_and_sample_alone(tmp_path: Path) -> None:
    suite = opened("mmlu_pro", tmp_path / "one")
    rows = suite.questions
    again = opened("mmlu_pro", tmp_path / "two")
    other = opened("mmlu_pro", tmp_path / "three", seed=1)
    for question in rows:
        orders = [suite.asked(question, sample).order for sample in range(8)]
        assert orders == [again.asked(question, sample).order for sample in range(8)]
        assert orders != [other.asked(question, sample).order for sample in range(8)]
        assert len(set(orders)) > 1 and all(sorted(o) == list(range(10)) for o in orders)
    once = replace(suite, protocol=replace(suite.protocol, shuffle="question"))
    assert len({once.asked(rows[0], sample).order for sample in range(8)}) == 1
    never = replace(suite, protocol=replace(suite.protocol, shuffle="none"))
    assert never.asked(rows[0], 5).order == tuple(range(10))
    many = [suite.asked(rows[0], sample).gold_place for sample in range(400)]
    assert max(Counter(many).values()) < 70  # of 400 over 10 places


def test_code_keeps_what_its_grader_reads(tmp_path: Path) -> None:
    suite = opened("livecodebench_v6", tmp_path)
    assert [question.text for question in suite.questions] == [text for _, text, *_ in PROGRAMS]
    assert {question.key for question in suite.questions} == {"own_0", "own_1", "own_2"}
    details = suite.questions[1].details
    assert json.loads(str(details["metadata"])) == {"func_name": "total"}
    assert json.loads(str(details["public_test_cases"]))[0]["testtype"] == "functional"
    assert details["private_test_cases"] and details["contest_date"] == "2025-02-08T00:00:00"
    # a Parquet copy may hold lists where the data hold JSON
    rows = [json.loads(line) for line in (tmp_path / "test6.jsonl").read_text().splitlines()]
    for row in rows:
        row["public_test_cases"] = json.loads(row["public_test_cases"])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "copy.parquet")
    copied = {"livecodebench_v6": str(tmp_path / "copy.parquet")}
    [copy] = open_suites([*copied], data=copied, warn=lambda line: None)
    tests = json.loads(str(copy.questions[1].details["public_test_cases"]))
    assert tests == json.loads(str(details["public_test_cases"]))
    assert "class Solution" in suite.asked(suite.questions[1], 0).words
    assert "standard input" in suite.asked(suite.questions[0], 0).words
    release = {"livecodebench_release_v6": str(tmp_path)}
    [whole] = open_suites([*release], data=release, warn=lambda line: None)
    assert len(whole.questions) == 4
    window = "livecodebench_release_v6:2025-01-11:2025-02-08"
    [some] = open_suites([window], data={window: str(tmp_path)}, warn=lambda line: None)
    assert [question.key for question in some.questions] == ["own_0", "own_1"]
    assert some.provenance["filter"] == "contest_date>=2025-01-11, contest_date<=2025-02-08"


def test_code(tmp_path: Path) -> None:
    suite = opened("livecodebench_v6", tmp_path)
    if refusal := refusal_of(suite.protocol.grading):
        pytest.skip(refusal)
    right, wrong = (f"```python\n{text}```" for text in SUM)
    with contextlib.ExitStack() as closing:
        asked = suite.asked(suite.questions[1], 0)
        texts = [right, wrong, "no program"]
        verdicts = grader_of(suite, closing).grade([Answer(asked, text, False) for text in texts])
    assert [verdict.reason for verdict in verdicts] == ["correct", "wrong", "no_answer"]


def test_ifbench_needs_its_package_and_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = opened("ifbench", tmp_path)
    assert [question.text for question in suite.questions] == [text for text, *_ in WRITING]
    assert suite.questions[0].details["arguments"] == [{"min_words": 2, "max_words": 4}]
    with contextlib.ExitStack() as closing, pytest.raises(ConfigError) as error:
        monkeypatch.setattr(instructions, "PACKAGE", "no-such-package")
        grader_of(suite, closing)
    assert str(error.value).endswith("install megatron-opd[ifbench]")
    monkeypatch.setattr(instructions, "PACKAGE", "numpy")
    monkeypatch.setenv("NLTK_DATA", str(tmp_path))
    monkeypatch.setattr(instructions, "NLTK_DATA", ("corpora/own", "corpora/other"))
    (tmp_path / "corpora" / "own").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"NLTK's data other are missing; .* set NLTK_DATA="):
        instructions.check_packages()
    (tmp_path / "corpora" / "other.zip").touch()
    instructions.check_packages()


def test_ifbench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in instructions.NLTK_DATA:  # these items need none of them
        (tmp_path / "nltk" / name).mkdir(parents=True)
    monkeypatch.setenv("NLTK_DATA", str(tmp_path / "nltk"))
    suite = opened("ifbench", tmp_path / "data")
    with contextlib.ExitStack() as closing:
        grader = grader_of(suite, closing)
        assert graded(grader, suite) == [("correct", "wrong")] * 3
        asked = suite.asked(suite.questions[2], 0)
        empty, loose = grader.grade(
            [Answer(asked, "<think>Word", True), Answer(asked, "Sure\nWord", False)]
        )
    assert (empty.reason, empty.score) == ("truncated", 0.0)
    assert dict(loose.parts) == {
        "prompt_strict": 0.0, "prompt_loose": 1.0, "instruction_strict": 0.0,
        "instruction_loose": 1.0,
    }  # fmt: skip


def test_every_suite_has_a_protocol_of_every_name(tmp_path: Path) -> None:
    for protocol in PRESETS:
        for name in SUITES:
            suite = opened(name, tmp_path / name, protocol=protocol)
            asked = suite.asked(suite.questions[0], 0)
            assert suite.questions[0].text in asked.words and "{" not in asked.words[:1]
            assert suite.protocol.note and suite.protocol.name == protocol
    luffy = opened("aime24", tmp_path / "aime24", protocol="luffy").protocol
    assert (luffy.samples, luffy.temperature, luffy.top_p, luffy.max_tokens) == (32, 0.6, 1.0, 8192)
    assert luffy.prompt == "{problem}" and "boxed" in str(luffy.system)
    tropd = opened("gpqa_diamond", tmp_path / "gpqa_diamond", protocol="tropd").protocol
    assert (tropd.samples, tropd.shuffle) == (4, "sample") and "not state" in tropd.note
    # the data have the right option first
    gpqa = opened("gpqa_diamond", tmp_path / "gpqa_diamond", protocol="luffy")
    assert gpqa.protocol.shuffle == "question"
    assert len({gpqa.asked(question, 0).gold for question in gpqa.questions}) > 1
    assert opened("arc_c", tmp_path / "arc_c", protocol="luffy").protocol.shuffle == "none"
    fewer = opened("aime24", tmp_path / "aime24", samples=2, max_tokens=77).protocol
    assert (fewer.samples, fewer.max_tokens) == (2, 77)


def test_graders_of_a_kind_share_their_workers(tmp_path: Path) -> None:
    names = ["aime24", "minerva", "minerva_legacy", "arc_c"]
    protocols = {name: protocol_of(SUITES[name], "luffy") for name in names}
    opened_kinds: list[str] = []

    class Closing(contextlib.ExitStack):
        def callback(self, function: object, *_: object, **__: object) -> object:  # type: ignore[override]
            opened_kinds.append(str(function))
            return super().callback(function)  # type: ignore[type-var]

    with Closing() as closing:
        graders = open_graders(protocols, RewardConfig(), closing)
    assert graders.keys() == protocols.keys() and len(opened_kinds) == 2


def test_groups_are_the_papers_tables() -> None:
    assert {name for group in GROUPS.values() for name in group} <= SUITES.keys()
    expected = {name: SUITES[name].questions for name in GROUPS["tropd_all"]}
    assert expected == {
        "aime24": 30, "aime25": 30, "amc23": 40, "gpqa_diamond": 198, "mmlu_redux_all": 5700,
        "ifbench": 300, "livecodebench_v6": 175,
    }  # fmt: skip


def test_a_users_own_suite_in_five_lines(tmp_path: Path, judges: dict[str, Judges]) -> None:
    rows = [{"q": text, "a": gold} for text, (gold, *_) in MATHS.items()]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "name: mine\ndata: mine.jsonl\ncolumns: {problem: q, answer: a}\ngrader: math\nsamples: 3\n"
    )
    [suite] = open_suites([str(recipe)])
    assert (suite.protocol.name, suite.protocol.samples) == ("own", 3)
    grader = MathGrader(judges["math"], suite.protocol.grading)
    assert {right for right, _ in graded(grader, suite)} == {"correct"}
    recipe.write_text("name: mine\ndata: mine.jsonl\ncolumns: {problem: q, answr: a}\n")
    with pytest.raises(ConfigError, match=r"mine.yaml: columns.answr: unknown; this grader reads"):
        open_suites([str(recipe)])
    recipe.write_text("name: aime24\ndata: mine.jsonl\n")
    with pytest.raises(ConfigError, match="aime24 is a suite already; choose another"):
        open_suites([str(recipe)])
    recipe.write_text("name: mine\ndata: mine.jsonl\nsample: 3\n")
    with pytest.raises(ConfigError, match="sample: unknown key; did you mean samples"):
        open_suites([str(recipe)])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("amc", "amc23 has the 40 problems of 2023"),
        ("livecodebench", "livecodebench_v6 has the 175"),
        ("mmlu", "mmlu_pro has 12,032"),
        ("aime2", "unknown suite; did you mean aime2"),
        ("livecodebench_release_v6:2025", "a window is its first and its last day"),
        ("aime24:2024-01-01:2024-02-01", "its questions have no dates"),
    ],
)
def test_names_that_mean_no_suite_are_explained(name: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        open_suites([name])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_wrong_data_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = tmp_path / "some.jsonl"
    path.write_text('{"Question": "1 + 1?", "solution": "2"}\n')

    def error(**data: str) -> str:
        with pytest.raises((ConfigError, DataError)) as caught:
            open_suites(["aime24"], data=data)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    wants = "aime24 wants a column answer | final_answer | expected_answer | "
    assert f"{path}: {wants}" in error(aime24=str(path))
    assert error(aime24=str(path)).endswith("; there are Question, solution")
    assert "no such file or folder; give --data aime24=PATH" in error(aime24=str(tmp_path / "x/y"))
    assert "no such file or folder" in error(aime24="no_folder/aime24.jsonl")  # no Hub id
    assert "--data aime25: is none of the suites" in error(aime25=str(path))
    path.write_text('{"problem": "1 + 1?", "answer": null}\n')
    assert error(aime24=str(path)) == f"{path}:1: no answer; correct the row"
    (tmp_path / "other.csv").write_text("problem,answer\n1,2\n")
    assert "has files of several kinds (other.csv, some.jsonl)" in error(aime24=str(tmp_path))
    (tmp_path / "empty").mkdir()
    assert "has no file of a kind that is read" in error(aime24=str(tmp_path / "empty"))


def test_another_number_of_questions_is_a_warning(tmp_path: Path) -> None:
    lines: list[str] = []
    suite = opened("aime25", tmp_path, warn=lines.append)
    [line] = lines
    assert line.startswith("aime25: 5 questions, where 30 are expected; ")
    assert (suite.provenance["questions"], suite.provenance["questions_expected"]) == (5, 30)
    assert suite.provenance["rows_read"] == 5
    assert [len(one) for one in dict(suite.provenance["sha256"]).values()] == [64]  # type: ignore[call-overload]


def test_rows_that_repeat_are_taken_once(tmp_path: Path) -> None:
    """LUFFY's files have every question 32 times."""
    lines: list[str] = []
    path = write_suite("aime25", tmp_path) / "test.jsonl"
    path.write_text(path.read_text().replace('"id"', '"number"') * 4)
    [suite] = open_suites(["aime25"], data={"aime25": str(path)}, warn=lines.append)
    assert len(suite.questions) == 5 and "is there 4 times" in lines[0]
    both = path.read_text().splitlines()[0] + "\n"
    path.write_text(path.read_text() + both)  # now one more often than others: as it is
    [suite] = open_suites(["aime25"], data={"aime25": str(path)}, warn=lines.append)
    keys = [question.key for question in suite.questions]
    assert len(keys) == 21 and len(set(keys)) == 21


def test_keys_do_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    path = write_suite("minerva", tmp_path) / "test.jsonl"
    [one] = open_suites(["minerva"], data={"minerva": str(path)}, warn=lambda line: None)
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    [other] = open_suites(["minerva"], data={"minerva": str(path)}, warn=lambda line: None)
    assert {q.key: q.text for q in one.questions} == {q.key: q.text for q in other.questions}


def test_a_share_of_the_questions_is_spread_over_groups_and_grows(tmp_path: Path) -> None:
    def keys(limit: int) -> set[str]:
        suite = opened("mmlu_redux_all", tmp_path, limit=limit)
        assert suite.provenance["asked"] == len(suite.questions)
        return {question.group + question.key for question in suite.questions}

    assert keys(1) < keys(2) < keys(4) < keys(9)
    assert {key[:4] for key in keys(2)} == {"anat", "viro"}


def test_gated_data_without_a_token_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError

    def refuse(*_: object, **__: object) -> None:
        response = httpx.Response(401, request=httpx.Request("GET", "https://hub.invalid"))
        raise GatedRepoError("no", response=response)

    monkeypatch.setattr(HfApi, "dataset_info", refuse)
    with pytest.raises(DataError) as error:
        open_suites(["gpqa_diamond"])
    assert str(error.value) == (
        "gpqa_diamond: Idavidrein/gpqa is gated; accept its terms on its page and set HF_TOKEN, or "
        "give its file or folder as --data gpqa_diamond=PATH"
    )


def test_data_of_the_hub_come_from_its_cache_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        DataError, match=r"hf download --repo-type dataset own/items@?.* --revision"
    ):
        open_suites(["aime25"], data={"aime25": "own/items@v1"})
    commit = "c" * 40
    stored = tmp_path / "datasets--own--items"
    write_suite("aime25", stored / "snapshots" / commit)
    (stored / "refs").mkdir()
    (stored / "refs" / "v1").write_text(commit)
    [suite] = open_suites(["aime25"], data={"aime25": "own/items@v1"}, warn=lambda line: None)
    assert len(suite.questions) == 5
    assert (suite.provenance["hub"], suite.provenance["revision"]) == ("own/items", commit)


def test_questions_among_training_problems_are_counted() -> None:
    words = [f"word{n}" for n in range(40)]
    texts = [" ".join(words[:20]), " ".join(words[20:33]), "What is 1 + 1?", "What is 2 + 2?"]
    questions = [Question(f"k{n}", text, "1") for n, text in enumerate(texts)]
    problems = [
        "Given: " + ", ".join(words[5:18]) + " so.",  # 13 in a row of the first
        " ".join(words[20:32]),  # 12 of the second
        "what is $1 + 1$",  # the third, in other marks
    ]
    found = contamination(questions, problems)
    assert (found.questions, found.problems, found.short) == (4, 3, 2)
    assert (found.exact, found.overlapping) == (("k2",), ("k0", "k2"))


def test_the_list_has_every_suite() -> None:
    rows = {row.name: row for row in listed_suites()}
    assert rows.keys() == SUITES.keys()
    assert rows["aime24"].samples == {"official": 32, "luffy": 32, "tropd": 32}
    assert rows["gpqa_diamond"].samples["tropd"] == 4
    assert rows["gpqa_diamond"].data.endswith("(gated: a token)")
    assert rows["mmlu_redux"].questions is None and rows["amc23"].groups == (
        "tropd_math",
        "tropd_all",
    )


def test_files_are_chosen_by_name(tmp_path: Path) -> None:
    """A folder per subject names the subject; compressed and plain files are two kinds."""
    write_suite("mmlu_redux_all", tmp_path / "arrow")
    folder = tmp_path / "parquet" / "anatomy" / "test"
    folder.mkdir(parents=True)
    source = pyarrow.memory_map(str(tmp_path / "arrow/anatomy/data-00000-of-00001.arrow"))
    pyarrow.parquet.write_table(pyarrow.ipc.open_stream(source).read_all(), folder / "0.v1.parquet")
    data = {"mmlu_redux_all": str(tmp_path / "parquet")}
    [suite] = open_suites([*data], data=data, warn=lambda line: None)
    assert [question.group for question in suite.questions] == ["anatomy"] * 3
    (folder / "1.parquet").write_bytes((folder / "0.v1.parquet").read_bytes())
    [twice] = open_suites([*data], data=data, warn=lambda line: None)
    assert twice.questions == suite.questions
