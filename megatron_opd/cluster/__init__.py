"""Runs on a Slurm cluster: from a recipe and a cluster's profile to a job that takes care of
itself."""
