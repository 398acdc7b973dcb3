"""A vLLM engine inside every trainer process: samples completions, takes new weights in memory.

Every rank holds a whole model (tensor-parallel size 1) and generates its share of the tasks. With
CUDA the engine sleeps outside `reload` and `generate`: its weights wait in host memory and its
key-value cache is given up.
"""

import contextlib
import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.distributed as dist

from megatron_opd.architectures.config import ModelConfig
from megatron_opd.architectures.ends import read_ends
from megatron_opd.contracts.sampling import Completion, ContextLogprobs, Request, Sampling
from megatron_opd.contracts.stations import Probes
from megatron_opd.errors import OpdError, RunError
from megatron_opd.recipe.keys import RolloutConfig
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
    logprobs_of,
    reading_params,
    run_requests,
    sampling_params,
    stream_requests,
)
from megatron_opd.rollout.vllm.start import check_context, start_vllm
from megatron_opd.world.device import device as local_device

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams


class VllmEngine:
    """vLLM with the weights of `model.path`, as policy version 0, or `empty` until `reload`.

    When torch.distributed is initialised, all ranks must construct their engines together, after
    the trainer's own process groups; otherwise vLLM makes a default group of one, and `close` ends
    it. `policy_version` is the version of the weights in the engine, None while they are
    unverified. With CUDA one engine of a process sleeps between calls; a second one needs
    `sleeps=False`, because vLLM cannot tell their memory apart. A completion stops at every end of
    the model (see `architectures.ends`), and at `further_ends`.
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
        self.sleep()

    def restart(self) -> None:
        """Replaces an engine that failed by a new one, constructed alike, on all ranks together.

        A broken CUDA context cannot be healed in its process.
        """
        with contextlib.suppress(Exception):  # the engine may be in any state
            self.close()
        # Dropped even if `close` failed, since the next engine needs their memory.
        for name in ("_llm", "_weights"):
            vars(self).pop(name, None)
        gc.unfreeze()  # in `close` too, but that may have failed before
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._start()

    # ------------------------------------------------------------------------------------- sampling
    def complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """The completions of the requests: see `contracts.stations.Engine.complete`.

        Logprobs depend on the other requests only by rounding, and equal calls give equal bits.
        """
        self._check_version(sampling)
        if not requests:
            return []
        params = [sampling_params(request, self._ends, sampling) for request in requests]
        contexts = [request.prompt_ids for request in requests]
        with self._awake(lambda: "generating"):
            try:
                outputs = self._run(contexts, params, sampling.keep_cache)
            finally:
                self.sleep()
        pairs = zip(requests, outputs, strict=True)
        return [completion_of(request, output) for request, output in pairs]

    def stream(
        self, drawn: Iterable[tuple[Request, Sampling]]
    ) -> Iterator[tuple[Request, Completion]]:
        """The completions as they end: see `contracts.stations.StreamingEngine.stream`."""
        with self._awake(lambda: "generating"):
            try:
                forget_prefixes(self._llm)
                for request, output in stream_requests(self._llm, self._with_params(drawn)):
                    yield request, completion_of(request, output)
            finally:
                self.sleep()

    def logprobs(self, contexts: Sequence[np.ndarray]) -> list[ContextLogprobs]:
        """What the model makes of contexts: see `contracts.stations.ReadingEngine.logprobs`."""
        with self._awake(lambda: "reading contexts"):
            try:
                outputs = self._run(list(contexts), [reading_params() for _ in contexts], False)
            finally:
                self.sleep()
        return [logprobs_of(output) for output in outputs]

    def _with_params(
        self, drawn: Iterable[tuple[Request, Sampling]]
    ) -> "Iterator[tuple[Request, SamplingParams]]":
        for request, sampling in drawn:
            self._check_version(sampling)
            yield request, sampling_params(request, self._ends, sampling)

    def _check_version(self, sampling: Sampling) -> None:
        if sampling.version != self.policy_version:
            raise RunError(
                f"rollouts of policy version {sampling.version} asked of an engine that holds "
                f"{self.policy_version}"
            )

    def _run(
        self,
        contexts: list[np.ndarray],
        params: "list[SamplingParams]",
        keep_cache: bool,
    ) -> "list[RequestOutput]":
        if not keep_cache:
            forget_prefixes(self._llm)
        with torch_generators_kept(self.device):
            return run_requests(self._llm, contexts, params)

    # -------------------------------------------------------------------------------------- weights
    def reload(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replaces all weights in place; names and shapes as in the Hugging Face directory.

        Leaves `policy_version` None, for the caller to set after it has verified the weights.
        Raises RunError naming a tensor that is missing, unknown or of another shape, and the
        exceptions of `named_tensors`.
        """
        self.policy_version = None
        delivery = Delivery(named_tensors, self._weights.shapes)
        with self._awake(delivery.progress):
            self._weights.forget_packing()
            # vLLM's loaders go layer by layer, and pack weights again that a plain copy would not
            # reach on the host.
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(delivery)})
        delivery.check()
        self._weights.pack_tied()

    def project(self, name: str, probes: Probes) -> list[torch.Tensor]:
        """The products of tensor `name` with the probes: see `LoadedWeights.project`."""
        with self._awake(lambda: f"reading {name}"):
            return self._weights.project(name, probes)

    # --------------------------------------------------------------------------------------- memory
    @contextlib.contextmanager
    def _awake(self, doing: Callable[[], str]) -> Iterator[None]:
        """Wakes vLLM; an exception within the block becomes a RunError that names the work."""
        try:
            self._wake()
            yield
        except OpdError:
            raise
        except Exception as error:
            raise RunError(f"vLLM failed while {doing()}: {error!r}") from error

    def _wake(self) -> None:
        if self._asleep:
            # vLLM allocates outside torch's cache, and needs the memory that lies unused in it.
            torch.cuda.empty_cache()
            self._llm.wake_up()
            self._asleep = False

    def sleep(self) -> None:
        """Gives the device's memory to models that score or train, until the next call."""
        if self._sleeps and not self._asleep:
            self._llm.sleep(level=1)
            self._asleep = True

    def close(self, *, groups_too: bool = True) -> None:
        """Ends the engine and, unless another engine uses them, vLLM's process groups.

        The trainer's groups stay.
        """
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
