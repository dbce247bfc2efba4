"""`fetch`: a real model for the user's cache."""
