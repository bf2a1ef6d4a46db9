"""From a store of tokens to the batch of step k on the devices: a pure function of (data, seed, step)."""
