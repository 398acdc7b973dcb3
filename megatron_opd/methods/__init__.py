"""The parts that a loss is made of, and the catalogue."""
