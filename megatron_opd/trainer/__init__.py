"""The update: the student with its optimizer, one step on a batch, checkpoints."""
