"""Checkpoints to and from Hugging Face, as a command."""
