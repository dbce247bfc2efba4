"""`bench`: throughput of several implementations."""
