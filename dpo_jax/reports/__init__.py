"""Reports on a run and its data, for people to read."""
