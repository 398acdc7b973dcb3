"""What travels between the stations."""
