"""Changes of a forward pass, the runner that carries them out, and the metrics that read it."""
