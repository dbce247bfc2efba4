"""Head attribution by gates: scores, how stable they are, and whether pruning bears them out."""
