"""Build the batch of step k on the devices from a token store: a pure function of (data, seed, step)."""
