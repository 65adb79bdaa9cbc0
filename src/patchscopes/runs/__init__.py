"""Recorded runs: an experiment as data, and what it takes to run it to its end."""
