"""Commands other than training, one file each."""
