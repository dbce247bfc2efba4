"""Which heads a model can do without, by every score: switched off, and measured."""
