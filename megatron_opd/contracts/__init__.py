"""The records that travel between stations, and what stations must do."""
