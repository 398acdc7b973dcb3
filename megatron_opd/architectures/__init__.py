"""A model directory: its sizes, its vocabulary, its layout over processes."""
