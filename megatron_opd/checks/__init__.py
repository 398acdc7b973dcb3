"""Everything that can be said before a process starts."""
