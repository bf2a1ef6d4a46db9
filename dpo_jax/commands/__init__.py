"""The commands but for training, a file each."""
