"""Files that are whole or not there, and values of the types they must have."""
