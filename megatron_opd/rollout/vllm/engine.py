"""A vLLM engine inside every trainer process: samples completions, takes new weights in memory.

Every rank holds a whole model (tensor-parallel size 1) and generates its share of the tasks. With
CUDA the engine sleeps outside `reload` and `generate`: its weights wait in host memory and its
key-value cache is given up.
"""

import contextlib
import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from megatron_opd.architectures.config import ModelConfig
from megatron_opd.architectures.ends import read_ends
from megatron_opd.contracts.draws import request_seed
from megatron_opd.contracts.rows import Episode, Row, Source, Task
from megatron_opd.contracts.stations import Probes
from megatron_opd.errors import OpdError, RunError
from megatron_opd.recipe.keys import RolloutConfig
from megatron_opd.rollout.requests import Completion, Request, room, sample_numbers
from megatron_opd.rollout.vllm.delivery import Delivery
from megatron_opd.rollout.vllm.host_process import (
    destroy_engine_groups,
    prepare_environment,
    torch_generators_kept,
    trainer_state_kept,
)
from megatron_opd.rollout.vllm.sampling import (
    completion_of,
    forget_prefixes,
    run_requests,
    sampling_params,
)
from megatron_opd.rollout.vllm.start import check_context, start_vllm
from megatron_opd.world.device import device as local_device


class VllmEngine:
    """vLLM with the weights of `model.path`, which count as policy version 0, or `empty` until
    `reload`.

    When torch.distributed is initialised, all ranks must construct their engines together, after
    the trainer's own process groups; otherwise vLLM makes a default group of one, and `close` ends
    it. `policy_version` is the version of the weights in the engine, None while they are
    unverified. With CUDA one engine of a process sleeps between calls; a second one has
    `sleeps=False`, for vLLM cannot tell their memory apart. A completion stops at every end of the
    model (see `config.ends`), and at `further_ends`.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: RolloutConfig,
        *,
        precision: Literal["float32", "bfloat16", "float16"],
        max_sequence_length: int,
        seed: int,
        sleeps: bool = True,
        empty: bool = False,
        further_ends: Sequence[int] = (),
    ) -> None:
        check_context(model, max_sequence_length)
        self.max_sequence_length = max_sequence_length
        self.device = local_device()
        self.dtype: torch.dtype = getattr(torch, precision)
        self._sleeps = sleeps and self.device.type == "cuda"
        self._empty = empty
        self._ends = sorted({*read_ends(model.path).ids, *further_ends})
        self._start_llm = partial(
            start_vllm,
            model,
            config,
            self.device,
            precision,
            max_sequence_length,
            seed,
            self._sleeps,
            empty,
        )
        prepare_environment(self.device)
        self._start()

    def _start(self) -> None:
        self.policy_version: int | None = None if self._empty else 0
        self._asleep = False
        self._owns_default_group = not dist.is_initialized()
        with trainer_state_kept(self.device):
            self._llm = self._start_llm()
        from megatron_opd.rollout.vllm.loaded_weights import LoadedWeights

        self._weights = LoadedWeights(self._llm.apply_model(lambda model: model)[0])
        self._tokenizer = self._llm.get_tokenizer()
        self.sleep()

    def restart(self) -> None:
        """A new engine in the place of one that failed, as it was constructed. All ranks together,
        as to construct.

        What broke the CUDA context of the process cannot be healed in it.
        """
        with contextlib.suppress(Exception):  # of an engine in any state
            self.close()
        # also where `close` failed: the next engine needs their memory
        for name in ("_llm", "_weights"):
            vars(self).pop(name, None)
        gc.unfreeze()  # in `close` too, but that may have failed before
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._start()

    # ------------------------------------------------------------------------------------- sampling
    def generate(
        self,
        tasks: list[Task],
        *,
        version: int,
        step: int,
        samples_per_prompt: int,
        max_completion_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        seed: int,
        prefix_of: Callable[[Task, int], np.ndarray] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Row]:
        """Samples as `contracts.stations.Engine.generate` says.

        Logprobs depend on the other tasks up to rounding, and are the same bit for bit when the
        call is.
        """
        samples = [
            (task, sample) for task in tasks for sample in sample_numbers(task, samples_per_prompt)
        ]
        requests = []
        for task, sample in samples:
            given = prefix_of(task, sample) if prefix_of else np.empty(0, np.int32)
            left = room(task, max_completion_tokens, self.max_sequence_length) - len(given)
            requests.append(
                Request(task, given, left, request_seed(seed, step, task.index, sample))
            )
        completions = self.complete(
            requests, version=version, temperature=temperature, top_p=top_p, on_progress=on_progress
        )  # fmt: skip
        return [
            self.row(
                request.task,
                sample,
                [*request.given.tolist(), *completion.token_ids],
                [0.0] * len(request.given) + completion.logprobs,
                [Source.TRACE] * len(request.given) + [Source.STUDENT] * len(completion.token_ids),
                completion.finish_reason,
            )
            for (_, sample), request, completion in zip(samples, requests, completions, strict=True)
        ]

    def complete(
        self,
        requests: Sequence[Request],
        *,
        version: int,
        temperature: float,
        top_p: float = 1.0,
        keep_cache: bool = False,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Completion]:
        """Continues every request, in order. `keep_cache`: keys and values of the call before may
        be used again.

        Raises RunError as `generate` does.
        """
        if version != self.policy_version:
            raise RunError(
                f"rollouts of policy version {version} asked of an engine that holds "
                f"{self.policy_version}"
            )
        if not requests:
            return []
        params = [sampling_params(request, self._ends, temperature, top_p) for request in requests]
        contexts = [
            np.concatenate([request.task.prompt_ids, request.given]) for request in requests
        ]
        with self._awake(lambda: "generating"):
            try:
                outputs = self._run(contexts, params, keep_cache, on_progress)
            finally:
                self.sleep()
        return [
            completion_of(request, output)
            for request, output in zip(requests, outputs, strict=True)
        ]

    def _run(
        self,
        contexts: list[np.ndarray],
        params: list[Any],
        keep_cache: bool,
        on_progress: Callable[[int, int], None] | None,
    ) -> list[Any]:
        if not keep_cache:
            forget_prefixes(self._llm)
        with torch_generators_kept(self.device):
            return run_requests(self._llm, contexts, params, on_progress)

    def row(
        self,
        task: Task,
        sample: int,
        token_ids: list[int],
        logprobs: list[float],
        sources: Sequence[int] | np.ndarray,
        finish_reason: str,
    ) -> Row:
        """A completion as a record, with its text, of the policy the engine holds."""
        assert self.policy_version is not None, "a completion is of weights that were verified"
        # an end need not be a special token
        written = token_ids[:-1] if finish_reason == "stop" else token_ids
        sources_T = np.array(sources, np.int8)
        return Row(
            episode=Episode(task, sample),
            prompt_ids=task.prompt_ids,
            token_ids=np.array(token_ids, np.int32),
            sources=sources_T,
            logprobs=np.array(logprobs, np.float32),
            versions=np.where(sources_T <= Source.TEACHER, self.policy_version, -1).astype(
                np.int32
            ),
            text=self._tokenizer.decode(written, skip_special_tokens=True),
            finish_reason=finish_reason,
        )

    # -------------------------------------------------------------------------------------- weights
    def reload(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replaces all weights in place; names and shapes as in the Hugging Face directory.

        Leaves `policy_version` None, for the caller to set once it has verified what arrived.
        Raises RunError naming a tensor that is missing, unknown or of another shape, and what
        `named_tensors` raises.
        """
        self.policy_version = None
        delivery = Delivery(named_tensors, self._weights.shapes)
        with self._awake(delivery.progress):
            self._weights.forget_packing()
            # Layer by layer through vLLM's loaders: on the host they pack anew what a plain copy
            # would not reach.
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(delivery)})
        delivery.check()
        self._weights.pack_tied()

    def project(self, name: str, probes: Probes) -> list[torch.Tensor]:
        """What the probes read, float32 [K, O], of each copy the engine holds of `name` (see
        LoadedWeights)."""
        with self._awake(lambda: f"reading {name}"):
            return self._weights.project(name, probes)

    # --------------------------------------------------------------------------------------- memory
    @contextlib.contextmanager
    def _awake(self, doing: Callable[[], str]) -> Iterator[None]:
        """Work that vLLM does awake; what it raises becomes a RunError that names the work."""
        try:
            self._wake()
            yield
        except OpdError:
            raise
        except Exception as error:
            raise RunError(f"vLLM failed while {doing()}: {error!r}") from error

    def _wake(self) -> None:
        if self._asleep:
            # vLLM allocates outside torch's cache and needs the trainer's unused blocks
            torch.cuda.empty_cache()
            self._llm.wake_up()
            self._asleep = False

    def sleep(self) -> None:
        """Gives the device's memory to models that score or train; the next call wakes the
        engine."""
        if self._sleeps and not self._asleep:
            self._llm.sleep(level=1)
            self._asleep = True

    def close(self, *, groups_too: bool = True) -> None:
        """Ends the engine and, where no other engine uses them, vLLM's process groups. The
        trainer's groups stay."""
        self._wake()
        # EngineCore.shutdown would destroy the trainer's default process group with its own.
        core = self._llm.llm_engine.engine_core.engine_core
        core.model_executor.shutdown()
        core.scheduler.shutdown()
        gc.unfreeze()  # vLLM froze every object alive when it started
        if groups_too:
            destroy_engine_groups(default_group_too=self._owns_default_group)
        self.policy_version = None
        del self._llm, self._weights
