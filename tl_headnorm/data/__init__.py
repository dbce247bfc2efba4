"""Questions, prompts and batches: everything before the model."""
