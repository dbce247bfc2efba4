"""`steer`: attention steering."""
