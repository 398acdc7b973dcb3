"""A model sampled and verified, not trained."""
