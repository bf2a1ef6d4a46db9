"""Convert preference data from files to token ids on disk. Nothing here depends on JAX, steps or batches."""
