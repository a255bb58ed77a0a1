"""Labels for unlabeled images: decisions, lists of images to review or label next, and files for labeling tools."""
