"""Whether a recipe fits a cluster, and which layouts would: memory from real Megatron modules,
times from a model."""
