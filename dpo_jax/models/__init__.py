"""The decoder, its attention, and its weights from and to Hugging Face directories."""
