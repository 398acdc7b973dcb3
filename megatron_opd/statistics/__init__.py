"""Scores over questions and samples, their intervals, and paired differences."""
