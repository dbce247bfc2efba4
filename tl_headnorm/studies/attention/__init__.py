"""Where heads look: patterns, scores, keywords, while writing, and under distraction."""
