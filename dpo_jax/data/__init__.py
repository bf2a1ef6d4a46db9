"""From preference data files to token ids on disk. Nothing here depends on JAX, steps or batches."""
