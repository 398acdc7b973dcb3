"""Requests into vLLM, completions out of it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from megatron_opd.contracts.sampling import Completion, Request, Sampling
from megatron_opd.errors import RunError

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams, TokensPrompt
    from vllm.v1.engine.llm_engine import LLMEngine


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
        # In the place of what vLLM reads from the model's files by itself.
        stop_token_ids=list(ends),
        ignore_eos=True,
        detokenize=False,  # text is decoded once, at the end
    )


def forget_prefixes(llm: "LLM") -> None:
    """Keys and values of earlier calls are not used again. Raises RunError while one of them runs.

    Those of older weights must not be seen; those of the same weights would make the numbers of
    this call depend on the run's history, and a resumed run differ.
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


def completion_of(request: Request, output: "RequestOutput") -> Completion:
    """What vLLM's output says. Raises RunError where it neither stopped nor came to its length."""
    sampled = output.outputs[0]
    if sampled.finish_reason not in ("stop", "length"):
        raise RunError(
            f"vLLM ended the completion of prompt {request.task.index} with "
            f"{sampled.finish_reason!r}"
        )
    return Completion(
        list(sampled.token_ids), list(sampled.logprobs.logprobs), sampled.finish_reason
    )
