"""The memory of vLLM: every rank has a whole model (tensor-parallel size 1) and a cache."""

from dataclasses import dataclass

from megatron_opd.architectures.config import LayoutConfig
from megatron_opd.planning.activations import FLOAT32
from megatron_opd.planning.case import Case
from megatron_opd.planning.hardware import GIB
from megatron_opd.planning.states import stages


@dataclass(frozen=True)
class EngineMemory:
    """Bytes of one rank's engine."""

    weights: int
    workspace: int  # set aside for vLLM's largest batch; an estimate
    cache: int  # left for keys and values; below 0 if weights and workspace are too large
    cache_per_token: int

    @property
    def total(self) -> int:
        """Bytes of weights, workspace and cache."""
        return self.weights + self.workspace + max(self.cache, 0)

    def sequences(self, length: int) -> int:
        """The number of sequences of this length that the cache holds."""
        return max(0, self.cache) // (self.cache_per_token * length)


def engine(case: Case, name: str) -> EngineMemory:
    """The engine of the model `name`.

    On CUDA it has a share of the device, and its cache is what weights and workspace leave of it;
    on the host the recipe sets the cache. The workspace is vLLM's largest batch of tokens within a
    layer (streams and, with fused kernels, three tensors of the MLP's width), and the sampler's
    logits in float32, twice.
    """
    arch = case.architectures[name]
    settings = case.config.rollout
    hardware = case.hardware
    (model,) = stages(arch, LayoutConfig(), case.config.precision)
    per_token = 2 * arch.num_layers * arch.num_key_value_heads * arch.head_dim * case.element
    width = arch.intermediate_size
    if arch.experts:
        width = arch.experts.per_token * arch.experts.intermediate_size
    workspace = hardware.engine_tokens * (4 * arch.hidden_size + 3 * width) * case.element
    workspace += 2 * hardware.engine_sequences * arch.vocab_size * FLOAT32
    if hardware.is_cuda:
        cache = int(settings.gpu_memory_utilization * hardware.memory) - model.num_bytes - workspace
        return EngineMemory(model.num_bytes, workspace, cache, per_token)
    # The host's kernels pack the output layer, so that there are two copies of tied embeddings.
    packed = arch.vocab_size * arch.hidden_size * case.element if arch.tie_word_embeddings else 0
    cache = int(settings.kv_cache_gib * GIB)
    return EngineMemory(model.num_bytes + packed, 0, cache, per_token)
