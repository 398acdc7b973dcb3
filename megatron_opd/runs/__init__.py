"""A run: its stations assembled, its directory, and its state."""
