"""What the commands do, from settings to files."""
