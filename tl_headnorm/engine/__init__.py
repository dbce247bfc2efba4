"""All that knows TransformerLens: hook names, forward passes, families, memory."""
