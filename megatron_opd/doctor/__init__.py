"""`megatron-opd doctor`: what is installed, and whether a recipe computes what it should."""
