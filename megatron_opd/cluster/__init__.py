"""Runs on a Slurm cluster: a recipe and a cluster's profile make a job that mends itself."""
