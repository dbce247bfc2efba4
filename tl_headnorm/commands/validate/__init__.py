"""`validate`: against Hugging Face."""
