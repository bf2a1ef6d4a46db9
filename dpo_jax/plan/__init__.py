"""Compile a run's own step ahead of time for a TPU topology, and bound its time and cost."""
