"""What writes the completions of prompts: an engine of this process, or a server."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from megatron_opd.contracts.sampling import Request, Sampling
from megatron_opd.contracts.stations import StreamingEngine, Tokenizer
from megatron_opd.errors import ConfigError, RunError
from megatron_opd.suites.asking import SuitePrompt

ANSWER_SECONDS = 3600.0  # of one completion, the wait in the server's queue included
CONNECT_SECONDS = 20.0
ATTEMPTS = 3  # of a request whose connection breaks


@dataclass(frozen=True)
class Written:
    """A completion."""

    text: str  # without special tokens
    tokens: int
    truncated: bool  # by the limit of tokens


class Writer(Protocol):
    """Writes completions, in the order in which they end."""

    def write(self, prompts: Iterable[SuitePrompt]) -> Iterator[tuple[SuitePrompt, Written]]:
        """Every prompt with its completion. Prompts are taken as there is room. Raises RunError."""


class EngineWriter:
    """Writes with an engine of this process."""

    def __init__(self, engine: StreamingEngine, tokenizer: Tokenizer) -> None:
        self._engine = engine
        self._tokenizer = tokenizer

    def write(self, prompts: Iterable[SuitePrompt]) -> Iterator[tuple[SuitePrompt, Written]]:
        """See `Writer.write`."""
        taken: dict[int, SuitePrompt] = {}

        def drawn() -> Iterator[tuple[Request, Sampling]]:
            for prompt in prompts:
                taken[id(prompt.request)] = prompt
                yield prompt.request, prompt.sampling

        for request, completion in self._engine.stream(drawn()):
            ids = completion.token_ids
            truncated = completion.finish_reason == "length"
            text = self._tokenizer.decode(ids if truncated else ids[:-1], skip_special_tokens=True)
            yield taken.pop(id(request)), Written(text, len(ids), truncated)


class ServerWriter:
    """Writes with a server that speaks the OpenAI completions API, a request for every sample.

    The server must hold the model whose tokenizer made the prompts: they are sent as tokens.
    """

    def __init__(self, url: str, parallel: int = 64) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._parallel = parallel
        served = self._ask("/v1/models", None, CONNECT_SECONDS)
        try:
            self.model = str(served["data"][0]["id"])  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            raise ConfigError(f"--server {url}: it names no model at /v1/models") from None

    def write(self, prompts: Iterable[SuitePrompt]) -> Iterator[tuple[SuitePrompt, Written]]:
        """See `Writer.write`."""
        waiting = iter(prompts)
        running: dict[Future[Written], SuitePrompt] = {}
        with ThreadPoolExecutor(self._parallel) as threads:
            try:
                while True:
                    for prompt in islice(waiting, self._parallel - len(running)):
                        running[threads.submit(self._completion, prompt)] = prompt
                    if not running:
                        return
                    ended, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in ended:
                        yield running.pop(future), future.result()
            finally:
                threads.shutdown(wait=False, cancel_futures=True)

    def _completion(self, prompt: SuitePrompt) -> Written:
        asked = {
            "model": self.model,
            "prompt": prompt.request.prompt_ids.tolist(),
            "max_tokens": prompt.request.max_tokens,
            "temperature": prompt.sampling.temperature,
            "top_p": prompt.sampling.top_p,
            "seed": prompt.request.seed,
            "n": 1,
        }
        answer = self._ask("/v1/completions", asked, ANSWER_SECONDS)
        try:
            choice = answer["choices"][0]  # type: ignore[index]
            tokens = int(answer["usage"]["completion_tokens"])  # type: ignore[index]
            return Written(str(choice["text"]), tokens, choice["finish_reason"] == "length")
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise RunError(
                f"--server {self._url}: its answer is not one of the completions API ({error!r})"
            ) from error

    def _ask(self, path: str, body: object, seconds: float) -> dict[str, object]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self._url + path, data=data, headers={"Content-Type": "application/json"}
        )
        for attempt in range(ATTEMPTS):
            try:
                with urllib.request.urlopen(request, timeout=seconds) as response:
                    return dict(json.loads(response.read()))
            except urllib.error.HTTPError as error:
                reason = error.read().decode(errors="replace")[:300]
                raise RunError(f"--server {self._url}: {error.code}: {reason}") from error
            except (OSError, ValueError) as error:
                if attempt == ATTEMPTS - 1:
                    raise RunError(
                        f"--server {self._url}{path} does not answer ({error}); is it running, "
                        "and is this its address?"
                    ) from error
        raise AssertionError("unreachable")
