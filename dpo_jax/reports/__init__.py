"""What a person reads of a run and its data."""
