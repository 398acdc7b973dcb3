"""Rotary angles of packed tokens, and frequencies for contexts longer than a model was first
trained on."""

import math

import torch
from torch import Tensor

from megatron_opd.architectures.rope import RopeScaling
from megatron_opd.mcore.packing import Packing


class PackedRotary(torch.nn.Module):
    """In the place of Megatron's embedding: every token's angles are those of its place in its own
    sequence."""

    def __init__(self, freqs_F: Tensor) -> None:
        super().__init__()
        self.freqs_F = freqs_F  # no buffer, so that it stays float32

    def get_rotary_seq_len(
        self, _context, _block, _hidden, _config, packed_seq_params: Packing
    ) -> Tensor:
        """What Megatron then passes to `forward`: here not a length, but the positions."""
        assert packed_seq_params.positions_S is not None, "made by Packing.of"
        return packed_seq_params.positions_S

    def forward(self, positions_S: Tensor, **_: object) -> Tensor:
        """float32 [S, 1, 1, head_dim], radians."""
        angles_SF = torch.outer(positions_S.float(), self.freqs_F.to(positions_S.device))
        return torch.cat([angles_SF, angles_SF], dim=-1)[:, None, None]


def scaled_frequencies(freqs_F: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """`theta ** (-2 i / head_dim)`, radians per position, float32 [head_dim / 2] -> those of
    `scaling`, likewise.

    Equal to transformers' `modeling_rope_utils.py`; YaRN's attention factor is not in them.
    """
    return {"linear": _linear, "llama3": _llama3, "yarn": _yarn}[scaling.rope_type](
        freqs_F, theta, scaling
    )


def _linear(freqs_F: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """Positions divided by the factor (arXiv 2306.15595)."""
    return freqs_F / scaling.factor


def _llama3(freqs_F: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: slow frequencies divided by the factor, fast ones kept, those between mixed by
    their turns."""
    # turns within the original context
    turns_F = scaling.original_max_position_embeddings * freqs_F / (2 * math.pi)
    kept_F = (turns_F - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    return _mixed(freqs_F, kept_F.clamp(0, 1), scaling.factor)


def _yarn(freqs_F: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """YaRN (arXiv 2309.00071, section 3.2): as Llama 3, but mixed along the dimensions, not the
    turns."""
    low, high = (
        _dimension_of(turns, len(freqs_F), theta, scaling)
        for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * len(freqs_F) - 1)
    width = high - low if high != low else 0.001
    divided_F = (
        torch.arange(len(freqs_F), dtype=torch.float32, device=freqs_F.device) - low
    ) / width
    return _mixed(freqs_F, 1 - divided_F.clamp(0, 1), scaling.factor)


def _dimension_of(turns: float, num_freqs: int, theta: float, scaling: RopeScaling) -> float:
    """The index at which a frequency turns so often within the original context; it need not be
    whole."""
    return (
        num_freqs
        * math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi))
        / math.log(theta)
    )


def _mixed(freqs_F: Tensor, kept_F: Tensor, factor: float) -> Tensor:
    return freqs_F * kept_F + freqs_F / factor * (1 - kept_F)
