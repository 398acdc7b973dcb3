"""What a run leaves behind: metrics, sampled rollouts, TensorBoard files, the terminal's progress,
the report."""
