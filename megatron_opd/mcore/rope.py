"""Rotary angles of packed tokens, and frequencies scaled for longer contexts."""

import math

import torch
from torch import Tensor

from megatron_opd.architectures.rope import RopeScaling
from megatron_opd.mcore.packing import Packing


class PackedRotary(torch.nn.Module):
    """Rotary angles by a token's place in its own sequence, instead of Megatron's embedding."""

    def __init__(self, freqs_F: Tensor) -> None:
        super().__init__()
        self.freqs_F = freqs_F  # not a buffer, so that it stays float32

    def get_rotary_seq_len(
        self, _context, _block, _hidden, _config, packed_seq_params: Packing
    ) -> Tensor:
        """The argument that Megatron passes to `forward`: here the positions, not a length."""
        assert packed_seq_params.positions_S is not None, "made by Packing.of"
        return packed_seq_params.positions_S

    def forward(self, positions_S: Tensor, **_: object) -> Tensor:
        """The angles, float32 [S, 1, 1, head_dim], in radians."""
        angles_SF = torch.outer(positions_S.float(), self.freqs_F.to(positions_S.device))
        return torch.cat([angles_SF, angles_SF], dim=-1)[:, None, None]


def scaled_frequencies(freqs_F: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """The frequencies of `scaling`, float32 [head_dim / 2], in radians per position.

    `freqs_F` are the usual ones, `theta ** (-2 i / head_dim)`. Equal to transformers'
    `modeling_rope_utils.py`; YaRN's attention factor is not in them.
    """
    scaled = {"linear": _linear, "llama3": _llama3, "yarn": _yarn}[scaling.rope_type]
    return scaled(freqs_F, theta, scaling)


def _linear(freqs_F: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """Positions divided by the factor (arXiv 2306.15595)."""
    return freqs_F / scaling.factor


def _llama3(freqs_F: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: slow frequencies are divided by the factor, fast ones kept, others mixed.

    Slow and fast are measured in turns within the original context.
    """
    turns_F = scaling.original_max_position_embeddings * freqs_F / (2 * math.pi)
    width = scaling.high_freq_factor - scaling.low_freq_factor
    kept_F = (turns_F - scaling.low_freq_factor) / width
    return _mixed(freqs_F, kept_F.clamp(0, 1), scaling.factor)


def _yarn(freqs_F: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """YaRN (arXiv 2309.00071, section 3.2): like Llama 3, but mixed by dimension, not by turns."""
    low = _dimension_of(scaling.beta_fast, len(freqs_F), theta, scaling)
    high = _dimension_of(scaling.beta_slow, len(freqs_F), theta, scaling)
    if scaling.truncate:
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, 2 * len(freqs_F) - 1)
    width = high - low if high != low else 0.001
    index_F = torch.arange(len(freqs_F), dtype=torch.float32, device=freqs_F.device)
    divided_F = (index_F - low) / width
    return _mixed(freqs_F, 1 - divided_F.clamp(0, 1), scaling.factor)


def _dimension_of(turns: float, num_freqs: int, theta: float, scaling: RopeScaling) -> float:
    """The index, not rounded, of the frequency with so many turns within the original context."""
    context = scaling.original_max_position_embeddings
    return num_freqs * math.log(context / (turns * 2 * math.pi)) / math.log(theta)


def _mixed(freqs_F: Tensor, kept_F: Tensor, factor: float) -> Tensor:
    return freqs_F * kept_F + freqs_F / factor * (1 - kept_F)
