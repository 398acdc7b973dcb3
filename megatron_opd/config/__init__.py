"""Recipes: the schema, loading and overriding, the catalogue of methods. Imports no torch."""
