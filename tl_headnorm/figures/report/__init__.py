"""report.html: everything a run holds on one self-contained page, with an explorer of its heads."""
