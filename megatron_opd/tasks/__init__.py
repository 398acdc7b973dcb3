"""Prompts: the data set, rendered with the recipe's template, tokenised and drawn in a resumable
random order."""
