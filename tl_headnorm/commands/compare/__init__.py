"""`compare`: two runs, head by head."""
