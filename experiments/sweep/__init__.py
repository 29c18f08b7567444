"""Sweeps: many runs as one experiment, from the list of runs to a common report."""
