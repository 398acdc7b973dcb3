"""The files and lines that a run leaves: metrics, sampled rows, TensorBoard files, progress."""
