"""`massive`: massive activations."""
