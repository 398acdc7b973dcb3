"""What judges the answers to a suite's questions."""
