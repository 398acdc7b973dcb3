"""The operation behind every objective: logprobs of a few ids over a sharded vocabulary."""

from megatron_opd.vocab_parallel.divergence import divergence
from megatron_opd.vocab_parallel.linear import linear_logprobs, linear_topk
from megatron_opd.vocab_parallel.merged import merge_logits, rows_of
from megatron_opd.vocab_parallel.ops import TeacherTopK, logprobs, topk
from megatron_opd.vocab_parallel.truncated import TruncatedKL, truncated_forward_kl

__all__ = [
    "TeacherTopK",
    "TruncatedKL",
    "divergence",
    "linear_logprobs",
    "linear_topk",
    "logprobs",
    "merge_logits",
    "rows_of",
    "topk",
    "truncated_forward_kl",
]
