"""Plans a recipe on a cluster: memory from real Megatron modules, times from a model."""
