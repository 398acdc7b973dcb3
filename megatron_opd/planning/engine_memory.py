"""What vLLM holds: every rank has a whole model (tensor-parallel size 1) and a cache of keys and
values."""

from dataclasses import dataclass

from megatron_opd.architectures.config import LayoutConfig
from megatron_opd.planning.activations import FLOAT32
from megatron_opd.planning.case import Case
from megatron_opd.planning.hardware import GIB
from megatron_opd.planning.states import stages


@dataclass(frozen=True)
class EngineMemory:
    weights: int  # bytes
    workspace: int  # what vLLM sets aside for its largest batch; an estimate
    cache: int  # what is left for keys and values; below 0 where nothing is
    cache_per_token: int

    @property
    def total(self) -> int:
        return self.weights + self.workspace + max(self.cache, 0)

    def sequences(self, length: int) -> int:
        """How many of this length the cache holds."""
        return max(0, self.cache) // (self.cache_per_token * length)


def engine(case: Case, name: str) -> EngineMemory:
    """On CUDA a share of the device, of which the cache is what weights and workspace leave; on the
    host what is asked.

    The workspace: vLLM's largest batch of tokens within a layer (streams and, with fused kernels,
    three of the MLP's width), and the sampler's logits in float32, twice.
    """
    arch, settings, hardware = case.architectures[name], case.config.rollout, case.hardware
    (whole,) = stages(arch, LayoutConfig(), case.config.precision)
    per_token = 2 * arch.num_layers * arch.num_key_value_heads * arch.head_dim * case.element
    width = (
        arch.experts.per_token * arch.experts.intermediate_size
        if arch.experts
        else arch.intermediate_size
    )
    workspace = hardware.engine_tokens * (4 * arch.hidden_size + 3 * width) * case.element
    workspace += 2 * hardware.engine_sequences * arch.vocab_size * FLOAT32
    if hardware.is_cuda:
        cache = int(settings.gpu_memory_utilization * hardware.memory) - whole.num_bytes - workspace
        return EngineMemory(whole.num_bytes, workspace, cache, per_token)
    # The host's kernels pack the output layer, so that tied embeddings are there twice.
    packed = arch.vocab_size * arch.hidden_size * case.element if arch.tie_word_embeddings else 0
    cache = int(settings.kv_cache_gib * GIB)
    return EngineMemory(whole.num_bytes + packed, 0, cache, per_token)
