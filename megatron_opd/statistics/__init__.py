"""Scores over questions and samples, their intervals, and paired differences. NumPy only.

Suffixes: N questions, K samples of every question. Scores are from 0, wrong, to 1, right.
"""
