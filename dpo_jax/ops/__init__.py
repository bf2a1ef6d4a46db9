"""Array functions that know shapes and a mesh, and no parameters."""
