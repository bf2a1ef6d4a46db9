"""From files of preferences to token ids on disk. Nothing here knows JAX, steps or batches."""
