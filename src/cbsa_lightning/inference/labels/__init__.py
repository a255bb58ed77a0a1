"""Labels for unlabelled images: decisions, what to review or label next, and files for labelling tools."""
