"""Environments of many turns, in worker processes, and the words between them and a model."""
