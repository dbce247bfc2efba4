"""The same numbers through Hugging Face alone."""
