"""Every key of a recipe; YAML to frozen dataclasses."""
