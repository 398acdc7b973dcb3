"""Completions of a server that speaks the OpenAI completions API."""

import http.client
import json
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from itertools import islice

from megatron_opd.errors import ConfigError, RunError
from megatron_opd.evaluation.writers import Written
from megatron_opd.suites.asking import SuitePrompt

ANSWER_SECONDS = 3600.0  # of one completion, the wait in the server's queue included
CONNECT_SECONDS = 20.0
ATTEMPTS = 4  # of a request whose connection breaks, or that comes too early
PAUSE_SECONDS = 1.0  # before the second attempt, doubled from then on
BUSY = (429, 502, 503, 504)
# vLLM's server takes what a request leaves out from the model's generation_config.json.
OF_THE_POLICY_ALONE = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}

Ended = tuple[SuitePrompt, Written | Exception]


class ServerWriter:
    """Writes with a server, a request for every sample.

    The server must hold the model whose tokenizer made the prompts: they are sent as tokens. Raises
    ConfigError where it names no model, RunError where it does not answer.
    """

    def __init__(self, url: str, parallel: int = 64) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._parallel = parallel
        served = self._ask("/v1/models", None, CONNECT_SECONDS)
        try:
            first = served["data"][0]  # type: ignore[index]
            self.model = str(first["id"])
        except (KeyError, IndexError, TypeError):
            raise ConfigError(f"--server {url}: it names no model at /v1/models") from None
        is_vllm = isinstance(first, dict) and first.get("owned_by") == "vllm"
        self._further = OF_THE_POLICY_ALONE if is_vllm else {}

    def write(self, prompts: Iterable[SuitePrompt]) -> Iterator[tuple[SuitePrompt, Written]]:
        """See `Writer.write`. Nobody waits for requests that are open when the caller stops."""
        waiting = iter(prompts)
        ended: queue.Queue[Ended] = queue.Queue()
        running = 0
        failure: Exception | None = None
        while True:
            places = 0 if failure else self._parallel - running
            for prompt in islice(waiting, places):
                threading.Thread(target=self._work, args=(prompt, ended), daemon=True).start()
                running += 1
            if not running or (failure and ended.empty()):
                break
            prompt, written = ended.get()
            running -= 1
            if isinstance(written, Written):
                yield prompt, written
            else:
                failure = failure or written
        if failure:
            raise failure

    def _work(self, prompt: SuitePrompt, ended: "queue.Queue[Ended]") -> None:
        try:
            ended.put((prompt, self._completion(prompt)))
        except Exception as error:
            ended.put((prompt, error))

    def _completion(self, prompt: SuitePrompt) -> Written:
        asked = {
            "model": self.model,
            "prompt": prompt.request.prompt_ids.tolist(),
            "max_tokens": prompt.request.max_tokens,
            "temperature": prompt.sampling.temperature,
            "top_p": prompt.sampling.top_p,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": prompt.request.seed,
            "n": 1,
            **self._further,
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
        """The JSON object of an answer. Raises RunError."""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(PAUSE_SECONDS * 2 ** (attempt - 1))
            last = attempt == ATTEMPTS - 1
            try:
                return self._answer(path, body, seconds)
            except urllib.error.HTTPError as error:
                if last or error.code not in BUSY:
                    reason = error.read().decode(errors="replace")[:300]
                    raise RunError(f"--server {self._url}: {error.code}: {reason}") from error
            except (OSError, ValueError, TypeError, http.client.HTTPException) as error:
                if last or isinstance(error, http.client.InvalidURL):
                    raise RunError(
                        f"--server {self._url}{path} does not answer ({error}); is it running, "
                        "and is this its address, such as http://node1:8000?"
                    ) from error
        raise AssertionError("the last attempt returns or raises")

    def _answer(self, path: str, body: object, seconds: float) -> dict[str, object]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self._url + path, data=data, headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=seconds) as response:
            return dict(json.loads(response.read()))
