"""What a loss is made of, and the catalogue."""
