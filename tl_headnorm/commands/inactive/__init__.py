"""`inactive`: heads a model can do without."""
