"""Processes: started, joined, apart, stopped; how two groups of them speak."""
