"""The keys of a recipe, and its way from YAML to frozen dataclasses."""
