"""`attribute`: head attribution."""
