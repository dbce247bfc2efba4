"""Loading a model: hub id, directory or memory, adapters, self-check."""
