"""`report.html`: one self-contained page about a run, for the person who owns the photos."""
