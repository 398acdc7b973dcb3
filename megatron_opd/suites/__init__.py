"""Benchmark suites: a table of them, their data, and how they are asked."""
