"""`report.html`: one self-contained page that summarizes a run."""
