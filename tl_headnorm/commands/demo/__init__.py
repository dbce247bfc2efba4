"""`demo`: the main job on the built-in model."""
