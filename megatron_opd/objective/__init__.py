"""Methods as losses: which signals they read, per-token columns with global denominators, and two
gradient kernels."""
