"""Suites asked of a model: samples, results, and two results compared."""
