"""Requests into vLLM, completions out of it."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from megatron_opd.contracts.sampling import Completion, ContextLogprobs, Request, Sampling
from megatron_opd.errors import RunError

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams, TokensPrompt
    from vllm.v1.engine.llm_engine import LLMEngine

# requests between two steps: engines that share a queue fill alike
TAKEN_AT_ONCE = 16


def sampling_params(request: Request, ends: Sequence[int], sampling: Sampling) -> "SamplingParams":
    """vLLM's parameters of one request, which stops at any of `ends`."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_tokens=request.max_tokens,
        seed=request.seed,
        logprobs=0,  # the sampled token's only
        flat_logprobs=True,
        # These replace the ends that vLLM reads from the model's files.
        stop_token_ids=list(ends),
        ignore_eos=True,
        stop=list(sampling.stop),
        detokenize=bool(sampling.stop),  # otherwise text is decoded once, at the end
    )


def reading_params() -> "SamplingParams":
    """vLLM's parameters of a context that is read alone: logprobs of its tokens."""
    from vllm import SamplingParams

    # vLLM always draws a token behind it
    return SamplingParams(
        temperature=0.0, max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False
    )


def forget_prefixes(llm: "LLM") -> None:
    """Drops the keys and values of earlier calls. Raises RunError while one of these runs.

    Keys of older weights would be wrong. Those of the same weights would make this call's numbers
    depend on the run's history, so that a resumed run would differ.
    """
    if not llm.reset_prefix_cache():
        raise RunError(
            "vLLM did not give up its prefix cache: requests of another call are still running"
        )


def run_requests(
    llm: "LLM",
    contexts: Sequence[np.ndarray],
    params: Sequence["SamplingParams"],
) -> "list[RequestOutput]":
    """vLLM's outputs for the contexts, in order."""
    token_ids: list[TokensPrompt] = [{"prompt_token_ids": context.tolist()} for context in contexts]
    engine: LLMEngine = llm.llm_engine
    request_ids = llm.enqueue(token_ids, params, use_tqdm=False)
    outputs: list[RequestOutput] = []
    try:
        while engine.has_unfinished_requests():
            outputs += [output for output in engine.step() if output.finished]
    except BaseException:  # Ctrl-C too must leave an engine without requests
        engine.abort_request(request_ids, internal=True)
        raise
    return sorted(outputs, key=lambda output: int(output.request_id))


def stream_requests(
    llm: "LLM", pairs: "Iterable[tuple[Request, SamplingParams]]"
) -> "Iterator[tuple[Request, RequestOutput]]":
    """vLLM's outputs as they end.

    A request is taken from `pairs` when the engine has a place for it, so that several engines may
    draw from one queue.
    """
    engine: LLMEngine = llm.llm_engine
    places = engine.vllm_config.scheduler_config.max_num_seqs
    waiting = iter(pairs)
    asked: dict[str, Request] = {}  # by vLLM's number of it
    internal_ids: list[str] = []
    try:
        while True:
            for request, params in islice(waiting, min(places - len(asked), TAKEN_AT_ONCE)):
                asked[str(llm.request_counter.counter)] = request
                prompt: TokensPrompt = {"prompt_token_ids": request.prompt_ids.tolist()}
                internal_ids += llm.enqueue([prompt], [params], use_tqdm=False)
            if not asked:
                return
            for output in engine.step():
                if output.finished:
                    yield asked.pop(output.request_id), output
    finally:
        if asked:  # an error, or a caller that needs no more
            engine.abort_request(internal_ids, internal=True)


def logprobs_of(output: "RequestOutput") -> ContextLogprobs:
    """The logprobs of a context in vLLM's output."""
    read = output.prompt_logprobs
    return ContextLogprobs(list(read.logprobs), list(read.ranks))


def completion_of(request: Request, output: "RequestOutput") -> Completion:
    """The completion in vLLM's output. Raises RunError if it ended for neither end nor length."""
    sampled = output.outputs[0]
    if sampled.finish_reason not in ("stop", "length"):
        raise RunError(
            f"vLLM ended the completion of prompt {request.task.index} with "
            f"{sampled.finish_reason!r}"
        )
    return Completion(
        list(sampled.token_ids),
        list(sampled.logprobs.logprobs),
        sampled.finish_reason,
        by_word=isinstance(sampled.stop_reason, str),
    )
