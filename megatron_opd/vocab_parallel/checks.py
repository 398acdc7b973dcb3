"""Checks of the operation's arguments, before anything is computed or sent.

Every check raises ValueError naming the argument.
"""

import torch
from torch import Tensor

from megatron_opd.vocab_parallel.shards import Group, size


def check_logits(logits_TV: Tensor, name: str = "logits_TV") -> None:
    """Refuses logits that are not contiguous floating point [T, V/tp]."""
    if logits_TV.dim() != 2 or not logits_TV.is_floating_point():
        raise ValueError(
            f"{name} must be floating point [T, V/tp], got {logits_TV.dtype} "
            f"{tuple(logits_TV.shape)}"
        )
    if not logits_TV.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous, got strides {logits_TV.stride()} for "
            f"{tuple(logits_TV.shape)}"
        )


def check_ids(ids_TK: Tensor, tokens: int, vocab: int, name: str = "ids_TK") -> None:
    """Refuses ids that are not int64 [T, K], or beyond a vocabulary of `vocab` ids."""
    if ids_TK.dim() != 2 or len(ids_TK) != tokens:
        raise ValueError(
            f"{name} must be [T, K] with T={tokens} as in the logits, got {tuple(ids_TK.shape)}"
        )
    if ids_TK.dtype != torch.long:
        raise ValueError(f"{name} must be int64, got {ids_TK.dtype}")
    if ids_TK.numel() and int(ids_TK.max()) >= vocab:
        raise ValueError(
            f"{name} holds id {int(ids_TK.max())}, the global vocabulary has {vocab} ids"
        )


def check_hidden(hidden_TD: Tensor, weight_VD: Tensor) -> None:
    """Refuses hidden states and a weight that have no product of one floating-point dtype."""
    shapes = (
        f"hidden_TD {tuple(hidden_TD.shape)} {hidden_TD.dtype}, "
        f"weight_VD {tuple(weight_VD.shape)} {weight_VD.dtype}"
    )
    if hidden_TD.dim() != 2 or weight_VD.dim() != 2 or hidden_TD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"hidden_TD and weight_VD must be [T, D] and [V/tp, D] with the same D, got {shapes}"
        )
    if not hidden_TD.is_floating_point() or hidden_TD.dtype != weight_VD.dtype:
        raise ValueError(
            f"hidden_TD and weight_VD must be of one floating-point dtype, got {shapes}"
        )


def check_k(k: int, width: int, group: Group, valid_vocab_size: int | None) -> None:
    """Refuses a `k` below 0 or above the vocabulary size."""
    vocab = size(group) * width
    if valid_vocab_size is not None:
        vocab = min(vocab, valid_vocab_size)
    if not 0 <= k <= vocab:
        raise ValueError(f"k={k} must lie between 0 and the vocabulary size {vocab}")
