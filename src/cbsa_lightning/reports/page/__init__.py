"""`report.html`, a self-contained page that summarizes a run."""
