"""Requests into vLLM, completions out of it."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_opd.errors import RunError
from megatron_opd.rollout.requests import Completion, Request

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams


def sampling_params(
    request: Request, ends: Sequence[int], temperature: float, top_p: float
) -> "SamplingParams":
    """vLLM's parameters of one request, which stops at any of `ends`."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=temperature,
        top_p=top_p,
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
    on_progress: Callable[[int, int], None] | None,
) -> list[Any]:
    """vLLM's outputs for the contexts, in order. `on_progress(done, total)` counts them."""
    token_ids: list[Any] = [{"prompt_token_ids": context.tolist()} for context in contexts]
    engine: Any = llm.llm_engine
    request_ids = llm.enqueue(token_ids, params, use_tqdm=False)
    outputs: list[Any] = []
    try:
        while engine.has_unfinished_requests():
            finished = [output for output in engine.step() if output.finished]
            outputs += finished
            if on_progress and finished:
                on_progress(len(outputs), len(contexts))
    except BaseException:  # Ctrl-C too must leave an engine without requests
        engine.abort_request(request_ids, internal=True)
        raise
    return sorted(outputs, key=lambda output: int(output.request_id))


def completion_of(request: Request, output: Any) -> Completion:
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
