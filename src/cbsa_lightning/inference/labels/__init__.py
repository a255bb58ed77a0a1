"""Labels for unlabeled images: decisions, what to review or label next, and files for labeling tools."""
