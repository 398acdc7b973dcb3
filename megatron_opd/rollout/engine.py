"""A vLLM engine inside every trainer process: samples completions, takes new weights in memory.

Every rank holds a whole model (tensor-parallel size 1) and generates its share of the prompts. With CUDA the engine
sleeps outside `reload` and `generate`: its weights wait in host memory and its key-value cache is given up.
"""

import gc
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from megatron_opd.config.architecture import architecture_of, config_changes
from megatron_opd.config.schema import ModelConfig, RolloutConfig
from megatron_opd.errors import ConfigError, OpdError, RunError
from megatron_opd.mcore.device import device as local_device
from megatron_opd.records import Prompt, Rollout
from megatron_opd.rollout.host_process import (
    destroy_engine_groups,
    executor_backend,
    prepare_environment,
    torch_generators_kept,
    trainer_state_kept,
)


class RolloutEngine:
    """vLLM with the weights of `model.path`, which count as policy version 0.

    When torch.distributed is initialised, all ranks must construct their engines together, after the trainer's own
    process groups; otherwise vLLM makes a default group of one, and `close` ends it.
    `policy_version` is the version of the weights in the engine, None while they are unverified.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: RolloutConfig,
        *,
        precision: Literal["float32", "bfloat16"],
        max_sequence_length: int,
        seed: int,
    ) -> None:
        _check_context(model, max_sequence_length)
        self._max_sequence_length = max_sequence_length
        self.device = local_device()
        self.dtype: torch.dtype = getattr(torch, precision)
        self.policy_version: int | None = 0
        self._asleep = False
        self._owns_default_group = not dist.is_initialized()
        prepare_environment(self.device)
        with trainer_state_kept(self.device):
            self._llm = _start_vllm(model, config, self.device, precision, max_sequence_length, seed)
        from megatron_opd.rollout.loaded_weights import LoadedWeights

        self._weights = LoadedWeights(self._llm.apply_model(lambda model: model)[0])
        self._tokenizer = self._llm.get_tokenizer()
        self._sleep()

    # ------------------------------------------------------------------------------------------------ sampling
    def generate(
        self,
        prompts: list[Prompt],
        *,
        version: int,
        step: int,
        samples_per_prompt: int,
        max_completion_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        seed: int,
        prefix_of: Callable[[Prompt, int], np.ndarray] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Rollout]:
        """`samples_per_prompt` completions of each prompt, prompt-major. Temperature 0 is greedy.

        A sample's tokens depend on (seed, step, prompt.index, sample) and the weights, not on the rank or on the other
        prompts; its logprobs (nats, of the distribution sampled from: after temperature and top_p) do so up to
        rounding, and bit for bit when the call is the same. `prefix_of(prompt, sample)` gives the first tokens of a
        completion, at least one fewer than it may have. `on_progress(done, total)` counts completions.
        Raises RunError when the engine does not hold `version` or fails; it then has no requests left.
        """
        if version != self.policy_version:
            raise RunError(f"rollouts of policy version {version} asked of an engine that holds {self.policy_version}")
        requests = [(prompt, sample) for prompt in prompts for sample in range(samples_per_prompt)]
        if not requests:
            return []
        from vllm import SamplingParams

        given = [prefix_of(*request) if prefix_of else np.empty(0, np.int32) for request in requests]
        params = [
            SamplingParams(
                temperature=temperature,
                top_p=top_p,
                max_tokens=self._room(prompt, max_completion_tokens) - len(prefix),
                seed=_sample_seed(seed, step, prompt.index, sample),
                logprobs=0,  # the sampled token's only
                flat_logprobs=True,
                detokenize=False,  # text is decoded once, at the end
            )
            for (prompt, sample), prefix in zip(requests, given, strict=True)
        ]
        contexts = [np.concatenate([p.token_ids, prefix]) for (p, _), prefix in zip(requests, given, strict=True)]
        self._wake()
        try:
            outputs = self._run(contexts, params, on_progress)
        except OpdError:
            raise
        except Exception as error:
            raise RunError(f"vLLM failed while generating for step {step}: {error!r}") from error
        finally:
            self._sleep()
        return [
            self._rollout(prompt, sample, prefix, output, version)
            for (prompt, sample), prefix, output in zip(requests, given, outputs, strict=True)
        ]

    def _run(self, contexts: list[np.ndarray], params: list, on_progress: Callable[[int, int], None] | None) -> list:
        # Keys and values of older weights must not be seen; those of an earlier call would make the numbers of this
        # one depend on the run's history, and a resumed run differ.
        if not self._llm.reset_prefix_cache():
            raise RunError("vLLM did not give up its prefix cache: requests of another call are still running")
        token_ids = [{"prompt_token_ids": context.tolist()} for context in contexts]
        engine = self._llm.llm_engine
        request_ids = self._llm.enqueue(token_ids, params, use_tqdm=False)
        outputs = []
        try:
            with torch_generators_kept(self.device):
                while engine.has_unfinished_requests():
                    finished = [output for output in engine.step() if output.finished]
                    outputs += finished
                    if on_progress and finished:
                        on_progress(len(outputs), len(contexts))
        except BaseException:  # Ctrl-C too must leave an engine without requests
            engine.abort_request(request_ids, internal=True)
            raise
        return sorted(outputs, key=lambda output: int(output.request_id))

    def _room(self, prompt: Prompt, max_completion_tokens: int) -> int:
        room = self._max_sequence_length - len(prompt.token_ids)
        if room < 1:
            raise RunError(
                f"prompt {prompt.index} has {len(prompt.token_ids)} tokens and leaves no room for a completion "
                f"(max_sequence_length={self._max_sequence_length}); set data.long_prompts=drop or raise the limit"
            )
        return min(max_completion_tokens, room)

    def _rollout(self, prompt: Prompt, sample: int, given: np.ndarray, output: Any, version: int) -> Rollout:
        completion = output.outputs[0]
        if completion.finish_reason not in ("stop", "length"):
            raise RunError(f"vLLM ended the completion of prompt {prompt.index} with {completion.finish_reason!r}")
        token_ids = [*given.tolist(), *completion.token_ids]
        logprobs = [0.0] * len(given) + list(completion.logprobs.logprobs)
        return Rollout(
            prompt=prompt,
            sample=sample,
            token_ids=np.array(token_ids, np.int32),
            logprobs=np.array(logprobs, np.float32),
            text=self._tokenizer.decode(token_ids, skip_special_tokens=True),
            finish_reason=completion.finish_reason,
            policy_version=version,
            given=len(given),
        )

    # ------------------------------------------------------------------------------------------------ weights
    def reload(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replaces all weights in place; names and shapes as in the Hugging Face directory.

        Leaves `policy_version` None, for the caller to set once it has verified what arrived. Raises RunError naming
        a tensor that is missing, unknown or of another shape, and what `named_tensors` raises.
        """
        self.policy_version = None
        self._wake()
        delivery = _Delivery(named_tensors, self._weights.shapes)
        try:
            # Layer by layer through vLLM's loaders: on the host they pack anew what a plain copy would not reach.
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(delivery)})
        except Exception as error:
            raise RunError(f"vLLM failed while taking weights, at {delivery.last}: {error!r}") from error
        delivery.check()

    def project(self, name: str, probes_KI: torch.Tensor) -> list[torch.Tensor]:
        """`probes @ tensor.T`, float32 [K, O], of each copy the engine holds of `name` (see LoadedWeights)."""
        self._wake()
        return self._weights.project(name, probes_KI)

    # ------------------------------------------------------------------------------------------------ memory
    def _wake(self) -> None:
        if self._asleep:
            torch.cuda.empty_cache()  # vLLM allocates outside torch's cache and needs the trainer's unused blocks
            self._llm.wake_up()
            self._asleep = False

    def _sleep(self) -> None:
        if self.device.type == "cuda" and not self._asleep:
            self._llm.sleep(level=1)
            self._asleep = True

    def close(self) -> None:
        """Ends the engine and its process groups. The trainer's groups stay."""
        self._wake()
        # EngineCore.shutdown would destroy the trainer's default process group with its own.
        core = self._llm.llm_engine.engine_core.engine_core
        core.model_executor.shutdown()
        core.scheduler.shutdown()
        gc.unfreeze()  # vLLM froze every object alive when it started
        destroy_engine_groups(default_group_too=self._owns_default_group)
        self.policy_version = None
        del self._llm, self._weights


class _Delivery:
    """Hands vLLM the tensors it knows and keeps count of the rest: an exception inside its loaders would leave it half
    loaded, with layers that have no storage."""

    def __init__(self, named_tensors: Iterable[tuple[str, torch.Tensor]], shapes: dict[str, tuple[int, ...]]) -> None:
        self._source = named_tensors
        self._shapes = shapes
        self._arrived: set[str] = set()
        self._problem: Exception | None = None
        self.last = "the first tensor"

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        try:
            for name, tensor in self._source:
                self.last = name
                if self._shapes.get(name) == tuple(tensor.shape):
                    self._arrived.add(name)
                    yield name, tensor
                elif self._problem is None:
                    expected = self._shapes.get(name, "no such tensor")
                    self._problem = RunError(f"weights for vLLM: {name} has shape {tuple(tensor.shape)}, {expected=}")
        except Exception as error:
            self._problem = error

    def check(self) -> None:
        if self._problem is not None:
            raise self._problem
        missing = sorted(self._shapes.keys() - self._arrived)
        if missing:
            raise RunError(f"weights for vLLM: {len(missing)} tensors did not arrive, first {missing[0]}")


def _start_vllm(
    model: ModelConfig,
    config: RolloutConfig,
    device: torch.device,
    precision: str,
    max_sequence_length: int,
    seed: int,
) -> Any:
    from vllm import LLM

    memory: dict[str, Any]
    if device.type == "cuda":
        memory = {"gpu_memory_utilization": config.gpu_memory_utilization, "enable_sleep_mode": True}
    else:
        memory = {"kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30)}
    return LLM(
        model=model.path,
        hf_overrides=config_changes(model.path, architecture_of(model)),
        dtype=precision,
        max_model_len=max_sequence_length,
        seed=seed,
        tensor_parallel_size=1,
        distributed_executor_backend=executor_backend(),
        enforce_eager=True,
        logprobs_mode="processed_logprobs",  # of the distribution sampled from, not of temperature 1
        enable_prefix_caching=True,
        use_tqdm_on_load=False,
        **memory,
    )


def _check_context(model: ModelConfig, max_sequence_length: int) -> None:
    limit = architecture_of(model).max_position_embeddings
    if max_sequence_length > limit:
        raise ConfigError(
            f"max_sequence_length={max_sequence_length} is more than {model.path}/config.json allows "
            f"(max_position_embeddings={limit}); lower it"
        )


def _sample_seed(seed: int, step: int, prompt_index: int, sample: int) -> int:
    """63 bits that depend on nothing else, so any rank draws the same sample."""
    return int(np.random.SeedSequence([seed, step, prompt_index, sample]).generate_state(1, np.uint64)[0] >> 1)
