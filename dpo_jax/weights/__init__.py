"""Models by path or hub name: load weights onto the mesh, load the tokenizer, export both to files."""
