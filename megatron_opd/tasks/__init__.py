"""Tasks: rows of a data set, rendered with the recipe's template, tokenised, and drawn in order."""
