"""The same prompts, or the same study, through several programs in turn."""
