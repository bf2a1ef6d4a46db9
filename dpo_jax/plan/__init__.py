"""The run's own step, compiled for a TPU slice that need not exist, and bounds on its time and cost."""
