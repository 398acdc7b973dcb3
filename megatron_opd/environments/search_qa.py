"""Search-QA: a question is answered after a few searches, and judged by exact match.

An action is `<search>words</search>` or `<answer>text</answer>`. What a search returns is a JSON
list of the passages' contents, which the dialogue puts into words.
"""

import gzip
import json
import re
import string
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from megatron_opd.environments.retrievers import check_retriever, open_retriever

Info = dict[str, object]
# Names of the columns: of the published sets (nq_hotpotqa_train), and of plain files.
QUESTIONS = ("question", "env_kwargs.question")
ANSWERS = (
    "answers",
    "golden_answers",
    "reward_model.ground_truth.target",
    "env_kwargs.ground_truth.target",
    "answer",
)
SOURCES = ("data_source", "env_kwargs.data_source", "source")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_SEARCH = re.compile(r"<search>(.*?)</search>", re.DOTALL)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
DATA_FILES = (".jsonl", ".jsonl.gz", ".parquet")


@dataclass(frozen=True)
class Question:
    """A row of the data."""

    text: str
    answers: tuple[str, ...]
    source: str = ""


class SearchQA:
    """A question, searches, an answer.

    `train` and `heldout` are .jsonl, .jsonl.gz or .parquet files; task ids are "train:ROW" and
    "heldout:ROW". `searches` is the most of an episode: a further one ends it unanswered, as the
    last turn's does in verl-agent; 0 sets no limit. `max_characters` of a search's passages are
    shown, 0 for all. Retrievers are in retrievers.py, and shared by the environments of a process.
    """

    def __init__(
        self,
        train: str = "",
        heldout: str = "",
        retriever: str = "bm25",
        corpus: str = "",
        index: str = "",
        encoder: str = "",
        query_prefix: str = "query: ",
        url: str = "",
        protocol: str = "queries",
        timeout: float = 10.0,
        attempts: int = 2,
        topk: int = 3,
        searches: int = 0,
        max_characters: int = 0,
    ) -> None:
        self._files = {"train": train, "heldout": heldout}
        self._retriever = open_retriever(
            retriever, corpus, index, encoder, query_prefix, url, protocol, timeout, attempts
        )
        self._topk = topk
        self._searches = searches or float("inf")
        self._max_characters = max_characters
        self._question = Question("", ())
        self._searched = 0

    @staticmethod
    def check(options: Mapping[str, str | int | float | bool]) -> str | None:
        """What is missing, and the remedy, in one line; or None."""
        named = {name: str(options.get(name, "")) for name in ("train", "heldout")}
        if not any(named.values()):
            return "train: missing; give a .jsonl or .parquet file of questions and answers"
        for name, path in named.items():
            if path and not Path(path).is_file():
                return f"{name}: no such file: {path}"
            if path and not path.endswith(DATA_FILES):
                return f"{name}: {path} is none of {', '.join(DATA_FILES)}"
        texts = {
            name: str(options.get(name, ""))
            for name in ("corpus", "index", "encoder", "url")
        }  # fmt: skip
        return check_retriever(
            kind=str(options.get("retriever", "bm25")),
            protocol=str(options.get("protocol", "queries")),
            **texts,
        )

    def task_ids(self, split: str) -> list[str]:
        """The rows of a split's file."""
        return [f"{split}:{row}" for row in range(len(self._questions(split)))]

    def reset(self, *, seed: int, options: dict[str, str]) -> tuple[str, Info]:
        """The question. Nothing is drawn, so that `seed` changes nothing."""
        split, _, row = options["task_id"].rpartition(":")
        questions = self._questions(split or "train")
        if not (row.isdecimal() and int(row) < len(questions)):
            raise ValueError(f"task {options['task_id']}: there are rows 0 to {len(questions) - 1}")
        self._question = questions[int(row)]
        self._searched = 0
        return self._question.text, self._info(valid=True)

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        """Searches, or judges an answer. Raises RetrievalError where a search cannot be made."""
        if "<answer>" in action and "</answer>" in action:
            score = exact_match(action, self._question.answers)
            return "", score, True, False, self._info(valid=True, score=score)
        query = _SEARCH.search(action)
        if query is None:
            return "", 0.0, False, False, self._info(valid=False)
        if self._searched >= self._searches:
            return "", 0.0, True, False, self._info(valid=True)
        self._searched += 1
        passages = self._retriever.search(query[1].strip(), self._topk)
        return json.dumps(self._shortened(passages)), 0.0, False, False, self._info(valid=True)

    def expert_action(self) -> str:
        """Searches for the question once, and then gives its first gold answer."""
        if self._searched:
            return f"<answer>{self._question.answers[0]}</answer>"
        return f"<search>{self._question.text}</search>"

    def _info(self, *, valid: bool, score: float = 0.0) -> Info:
        return {
            "task": self._question.text,
            "task_type": self._question.source,
            "won": score >= 1.0,
            "score": score,
            "valid": valid,
        }

    def _shortened(self, passages: list[str]) -> list[str]:
        if not self._max_characters:
            return passages
        left = self._max_characters
        shortened = []
        for passage in passages:
            shortened.append(passage[:left])
            left -= len(shortened[-1])
        return [passage for passage in shortened if passage]

    def _questions(self, split: str) -> tuple[Question, ...]:
        path = self._files.get(split)
        if path is None:
            raise ValueError(f"no split {split!r}; Search-QA has train and heldout")
        if not path:
            raise ValueError(f"environment.options.{split}: missing; give a file of questions")
        return read_questions(path)


@cache
def read_questions(path: str) -> tuple[Question, ...]:
    """The questions of a file, read once in a process. Raises ValueError naming file and row."""
    return tuple(_question(row, f"{path}: row {number}") for number, row in enumerate(_rows(path)))


def normalized(answer: str) -> str:
    """An answer as it is compared: lower case, no punctuation, no articles, single blanks."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def exact_match(text: str, answers: Iterable[str]) -> float:
    """1 if the text's last <answer> equals one of the gold answers, else 0."""
    tagged = _ANSWER.findall(text)
    return float(bool(tagged) and normalized(tagged[-1]) in {normalized(gold) for gold in answers})


def _rows(path: str) -> Iterator[Mapping[str, object]]:
    if path.endswith(".parquet"):
        import pyarrow.parquet as parquet

        yield from parquet.read_table(path).to_pylist()
        return
    with gzip.open(path, "rt") if path.endswith(".gz") else open(path, encoding="utf-8") as file:
        for number, line in enumerate(file):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}: row {number}: no JSON ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}: row {number}: no JSON object")
            yield row


def _question(row: Mapping[str, object], place: str) -> Question:
    text = _first(row, QUESTIONS)
    answers = _first(row, ANSWERS)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{place}: no question; it must be in one of {', '.join(QUESTIONS)}")
    gold = [answers] if isinstance(answers, str) else answers
    if not (isinstance(gold, list) and gold and all(isinstance(one, str) for one in gold)):
        raise ValueError(f"{place}: no answers; they must be in one of {', '.join(ANSWERS)}")
    return Question(text.strip(), tuple(gold), str(_first(row, SOURCES) or ""))


def _first(row: Mapping[str, object], names: tuple[str, ...]) -> object:
    """The value of the first of these columns that the row has; a dot leads into a nested one."""
    for name in names:
        value: object = row
        for key in name.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            return value
    return None
