"""Steering: attention to chosen tokens boosted or suppressed, and what that does."""
