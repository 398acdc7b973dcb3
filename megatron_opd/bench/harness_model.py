"""A model as `lm-eval` asks it. Imports that package, which is an extra of its own."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_opd.bench.harness_engines import Completing, Engines, Reading
from megatron_opd.contracts.draws import request_seed
from megatron_opd.contracts.rows import Task
from megatron_opd.contracts.sampling import Request, Sampling
from megatron_opd.errors import ConfigError
from megatron_opd.suites.asking import SUITE_STREAM
from megatron_opd.suites.forms import digest
from megatron_opd.tasks.tokenizer import Tokenizer

# what a task may ask of a generation
KNOWN_KEYS = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}
TokenPair = tuple[list[int], list[int]]  # a context and its continuation


class HarnessModel(TemplateLM):
    """The model that `Engines` hold, on their first process.

    Samples of one question differ, also where a task asks it several times: a draw depends on the
    seed, the task, the document and the number of the sample. `context` is the number of tokens
    that the model can read. Contexts that are too long lose their beginning, as is usual there.
    """

    def __init__(
        self,
        engines: Engines,
        tokenizer: Tokenizer,
        *,
        context: int,
        seed: int,
        about: Mapping[str, object],
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self._engines = engines
        self._context = context
        self._seed = seed
        self._about = dict(about)

    # --------------------------------------------------------------------------------------- tokens
    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text whose first token is judged too."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        """The tokens of a text; a beginning that a chat template wrote is not written twice."""
        begin = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = not (begin and string.startswith(begin))
        ids = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return [int(token) for token in ids]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The messages as the model's template writes them."""
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    def get_model_info(self) -> dict[str, object]:
        """What a result says of its model."""
        return self._about

    # ------------------------------------------------------------------------------------- logprobs
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: object
    ) -> list[tuple[float, bool]]:
        """The logprob of every continuation in nats, and whether greedy decoding writes it."""
        return self._continuations([(context, after) for _, context, after in requests])

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The logprob of every text, in windows where it is longer than the model reads."""
        windows: list[TokenPair] = []
        texts: list[int] = []  # of every window
        for number, request in enumerate(requests):
            of_text = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._context - 2,
                context_len=1,
            )
            for window in of_text:
                windows.append(make_disjoint_window(window))
                texts.append(number)
        sums = [0.0] * len(requests)
        for number, (logprob, _) in zip(texts, self._continuations(windows), strict=True):
            sums[number] += logprob
        return sums

    def _continuations(self, pairs: Sequence[TokenPair]) -> list[tuple[float, bool]]:
        longest = self._context - 1  # the engine draws a token behind
        for _, after in pairs:
            if len(after) >= longest or not after:
                raise ConfigError(
                    f"--lm-eval: a continuation of {len(after)} tokens cannot be judged by a model "
                    f"that reads {self._context}; leave its task out"
                )
        contexts = [
            np.array([*context, *after][-longest:], dtype=np.int32) for context, after in pairs
        ]
        judged = []
        read = self._engines.results(Reading(contexts))
        for (_, after), tokens in zip(pairs, read, strict=True):
            judged.append(
                (
                    sum(tokens.logprobs[-len(after) :]),
                    all(rank == 1 for rank in tokens.ranks[-len(after) :]),
                )
            )
        return judged

    # ---------------------------------------------------------------------------------- completions
    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The completion of every request, without the text that ended it."""
        drawn = []
        asked: Counter[tuple[object, ...]] = Counter()
        for request in requests:
            question = (request.task_name, request.doc_id, request.idx)
            drawn.append(self._drawn(request, sample=asked[question]))
            asked[question] += 1
        completions = self._engines.results(Completing(drawn))
        texts = []
        for (_, sampling), completion in zip(drawn, completions, strict=True):
            text = self.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
            texts.append(cut(text, sampling.stop))
        return texts

    def _drawn(self, request: Instance, sample: int) -> tuple[Request, Sampling]:
        """A request as the engine reads it. Raises ConfigError for what it cannot do."""
        words, keys = request.args
        wanted = normalize_gen_kwargs(keys)
        unknown = sorted(set(wanted) - KNOWN_KEYS)
        if unknown:
            raise ConfigError(
                f"--lm-eval: task {request.task_name} asks for {', '.join(unknown)} in its "
                f"generation_kwargs; this engine knows {', '.join(sorted(KNOWN_KEYS))}"
            )
        tokens = min(int(wanted["max_gen_toks"]), self._context - 1)
        ids = np.array(self.tok_encode(words)[-(self._context - tokens) :], dtype=np.int32)
        number = int(digest(f"{request.task_name}\n{request.doc_id}\n{request.idx}")[:12], 16)
        task = Task(number, words, "", words, ids, first_sample=sample)
        sampling = Sampling(
            0,
            temperature=float(wanted["temperature"] or 0.0),
            top_p=float(wanted.get("top_p", 1.0)),
            stop=tuple(text for text in wanted["until"] if text),
        )
        seed = request_seed(self._seed, SUITE_STREAM, number, sample)
        return Request(task, ids, tokens, seed), sampling


def cut(text: str, stop: Sequence[str]) -> str:
    """The text up to the first of the words that end it."""
    return text[: min([text.find(word) for word in stop if word in text], default=len(text))]
