"""The one operation behind every objective: log-probabilities of a few ids per token over a sharded vocabulary."""

from megatron_opd.mcore.vocab_parallel.ops import TeacherTopK, logprobs, topk

__all__ = ["TeacherTopK", "logprobs", "topk"]
