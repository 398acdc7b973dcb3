"""A first recipe, drafted from a few answers."""
