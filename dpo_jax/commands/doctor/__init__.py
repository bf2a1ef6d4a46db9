"""Check the machine, slice, bucket and config of a run: one finding a line, each fault with a remedy."""
