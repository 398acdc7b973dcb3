"""A run: its stations assembled, its directory, what it goes on from."""
