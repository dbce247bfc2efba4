"""`merge`: runs of parts of a dataset."""
