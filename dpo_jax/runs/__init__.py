"""A run on disk: its files, lock, logs and saved steps. What is trained is not known here."""
