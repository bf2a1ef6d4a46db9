"""What a user names as a model: its weights on the mesh, its tokenizer, and back to files."""
