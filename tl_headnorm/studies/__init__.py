"""Functions that return a Dataset; they never import each other."""
