"""Attention and token log-probs as array functions, which depend on shapes and the mesh but on no model."""
