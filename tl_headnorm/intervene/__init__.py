"""Changing a pass: edits and gates of z, changed runs side by side, and what they are read by."""
