"""`evaluate`: accuracy by letter or by option text."""
