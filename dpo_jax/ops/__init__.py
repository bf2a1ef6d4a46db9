"""Array functions of shapes and a mesh, independent of model parameters."""
