"""`collect`: every head over a dataset."""
