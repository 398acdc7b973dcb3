"""Weights between Hugging Face and Megatron: one table for loading, export and refit."""

from megatron_opd.weights.export import export_hf, iter_hf_tensors
from megatron_opd.weights.load import check_hf, load_hf

__all__ = ["check_hf", "export_hf", "iter_hf_tensors", "load_hf"]
