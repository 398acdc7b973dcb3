"""Banks of privileged texts: which of them an episode gets."""
