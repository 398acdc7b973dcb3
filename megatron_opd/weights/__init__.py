"""Weights between Hugging Face and Megatron: one table for checking, loading, export and refit.

Importing this package imports no torch.
"""
