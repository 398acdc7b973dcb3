"""What finds passages for a query: BM25, dense vectors in a faiss index, or a server.

A corpus is a JSONL file, a passage a line, in the order of the index: {"id": ..., "contents": ...},
the title in the contents' first line. Everything heavy is imported when a retriever is made.
"""

import json
import mmap
import sys
import time
import urllib.error
import urllib.request
from array import array
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

PACKAGES = {"bm25": ("bm25s",), "faiss": ("faiss", "torch", "transformers"), "http": ()}
PROTOCOLS = ("queries", "query")  # of Search-R1's server, and of verl-agent's
LUCENE_K1 = 0.9  # the constants of Pyserini
LUCENE_B = 0.4
MAX_QUERY_TOKENS = 256  # what the published E5 index was asked with


class RetrievalError(RuntimeError):
    """A query could not be answered. Its episode has failed: an error is no passage."""


class Retriever(Protocol):
    """Finds passages."""

    def search(self, query: str, topk: int) -> list[str]:
        """The contents of the `topk` best passages, best first; fewer if there are fewer."""


class Corpus:
    """The passages of a JSONL file, which stays on the disk: only its lines' places are kept."""

    def __init__(self, path: str) -> None:
        with open(path, "rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._path = path
        self._starts = array("q", [0])
        end = self._bytes.find(b"\n")
        while end >= 0:
            self._starts.append(end + 1)
            end = self._bytes.find(b"\n", end + 1)
        if self._starts[-1] < len(self._bytes):  # the last line may have no line break
            self._starts.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def texts(self) -> list[str]:
        """All passages."""
        return [self[number] for number in range(len(self))]

    def __getitem__(self, number: int) -> str:
        if not 0 <= number < len(self):
            raise IndexError(number)
        line = self._bytes[self._starts[number] : self._starts[number + 1]]
        try:
            return str(json.loads(line)["contents"])
        except (ValueError, KeyError, TypeError):
            raise RetrievalError(
                f'{self._path}:{number + 1}: must be a JSON object with "contents"'
            ) from None


class Bm25:
    """BM25 by bm25s with Lucene's formula, of words of two letters and more but stop words.

    The index is made of the corpus in memory, or is a directory that bm25s has saved.
    """

    def __init__(self, corpus: str, index: str = "") -> None:
        import bm25s

        self._bm25s = bm25s
        self._corpus = Corpus(corpus)
        if index:
            self._index = bm25s.BM25.load(index, mmap=True)
        else:
            self._index = bm25s.BM25(method="lucene", k1=LUCENE_K1, b=LUCENE_B)
            words = bm25s.tokenize(self._corpus.texts(), stopwords="en", show_progress=False)
            self._index.index(words, show_progress=False)

    def search(self, query: str, topk: int) -> list[str]:
        """The passages that share a word with the query."""
        words = self._bm25s.tokenize([query], stopwords="en", return_ids=False, show_progress=False)
        count = min(topk, len(self._corpus))
        numbers, scores = self._index.retrieve(words, k=count, show_progress=False, n_threads=0)
        return [
            self._corpus[int(number)]
            for number, score in zip(numbers[0], scores[0], strict=True)
            if score > 0
        ]


class Dense:
    """A faiss index of normalised vectors, asked with an encoder whose outputs are averaged.

    The published index of Wikipedia has E5's: the queries then have "query: " ahead of them.
    """

    def __init__(self, corpus: str, index: str, encoder: str, query_prefix: str) -> None:
        import faiss
        import torch
        from transformers import AutoModel, AutoTokenizer

        self._torch = torch
        self._corpus = Corpus(corpus)
        self._index = faiss.read_index(index)
        self._tokenizer = AutoTokenizer.from_pretrained(encoder, local_files_only=True)
        self._encoder = AutoModel.from_pretrained(encoder, local_files_only=True).float().eval()
        self._prefix = query_prefix
        if self._index.ntotal != len(self._corpus):
            raise RetrievalError(
                f"{index}: has {self._index.ntotal} vectors, and {corpus} {len(self._corpus)} "
                "passages; give the corpus that the index was made of"
            )

    def search(self, query: str, topk: int) -> list[str]:
        """The passages of the vectors with the largest inner products."""
        _, numbers = self._index.search(self.encode([self._prefix + query]), topk)
        return [self._corpus[int(number)] for number in numbers[0] if number >= 0]

    def encode(self, texts: list[str]):
        """The texts' vectors: float32 [texts, hidden], of length 1."""
        tokens = self._tokenizer(
            texts, max_length=MAX_QUERY_TOKENS, padding=True, truncation=True, return_tensors="pt"
        )
        with self._torch.no_grad():
            hidden = self._encoder(**tokens).last_hidden_state
        mask = tokens["attention_mask"][..., None]
        means = (hidden * mask).sum(1) / mask.sum(1)
        return self._torch.nn.functional.normalize(means, dim=-1).numpy()


class Server:
    """A retrieval server, asked by HTTP with either of the two protocols in use.

    A server of one's own is asked directly: proxies of the environment's variables are not used.
    """

    def __init__(self, url: str, protocol: str, timeout: float, attempts: int) -> None:
        self._url = url
        self._protocol = protocol
        self._timeout = timeout
        self._attempts = attempts
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def search(self, query: str, topk: int) -> list[str]:
        """The server's passages. Raises RetrievalError once every attempt has failed."""
        asked = {"queries": [query]} if self._protocol == "queries" else {"query": query}
        body = json.dumps({**asked, "topk": topk, "return_scores": True}).encode()
        problem = ""
        for attempt in range(self._attempts):
            if attempt:
                time.sleep(attempt)
            try:
                return self._ask(body)
            except urllib.error.HTTPError as error:
                problem = f"status {error.code}"
                if error.code < 500:
                    break  # the same question would get the same answer
            except (OSError, ValueError) as error:  # no connection, time-out, no JSON
                problem = str(error) or type(error).__name__
        raise RetrievalError(
            f"{self._url}: the retriever does not answer ({problem}); start it, or correct "
            "environment.options.url and .protocol"
        )

    def _ask(self, body: bytes) -> list[str]:
        request = urllib.request.Request(
            self._url, data=body, headers={"Content-Type": "application/json"}
        )
        with self._opener.open(request, timeout=self._timeout) as response:
            answer = json.load(response)
        try:
            hits = answer["result"][0]
            return [str(hit.get("document", hit)["contents"]) for hit in hits]
        except (LookupError, TypeError, AttributeError):
            raise ValueError(f"unknown answer {str(answer)[:80]!r}") from None


@cache
def open_retriever(
    kind: str,
    corpus: str,
    index: str,
    encoder: str,
    query_prefix: str,
    url: str,
    protocol: str,
    timeout: float,
    attempts: int,
) -> Retriever:
    """The retriever of these options, made once in a process and asked once, to see it answer.

    Raises RetrievalError where it does not, or where this interpreter lacks its package.
    """
    missing = [module for module in PACKAGES[kind] if find_spec(module) is None]
    if missing:
        raise RetrievalError(
            f"retriever={kind} needs the package {missing[0]}, which {sys.executable} lacks; set "
            "environment.python to one that has it"
        )
    retriever: Retriever
    if kind == "bm25":
        retriever = Bm25(corpus, index)
    elif kind == "faiss":
        retriever = Dense(corpus, index, encoder, query_prefix)
    else:
        retriever = Server(url, protocol, timeout, attempts)
    retriever.search("who", 1)
    return retriever


def check_retriever(
    kind: str, corpus: str, index: str, encoder: str, url: str, protocol: str
) -> str | None:
    """What is missing for a retriever of these options, and the remedy, in one line; or None."""
    if kind not in PACKAGES:
        return f"retriever: unknown value {kind!r}; choose one of {', '.join(PACKAGES)}"
    if kind == "http":
        if protocol not in PROTOCOLS:
            return f"protocol: unknown value {protocol!r}; choose one of {', '.join(PROTOCOLS)}"
        if not url.startswith(("http://", "https://")):
            return f"url: {url!r} is no address; give one such as http://localhost:8000/retrieve"
        return None
    needed = {"corpus": corpus}
    if kind == "faiss":
        needed |= {"index": index, "encoder": encoder}
    elif index:
        needed |= {"index": index}
    for option, path in needed.items():
        if not path:
            return f"{option}: missing; retriever={kind} needs it"
        if not Path(path).exists():
            return f"{option}: no such file or directory: {path}"
    return None
