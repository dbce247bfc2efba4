"""`bench`: throughput side by side."""
