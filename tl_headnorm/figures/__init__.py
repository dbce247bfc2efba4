"""Arrays and tables -> interactive pages and PNGs. Imports no torch."""
