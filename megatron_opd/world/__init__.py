"""Processes: how they start, join, stop, and how those of two roles talk to one another."""
