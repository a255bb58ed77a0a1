"""What happens once an epoch, and what a run leaves behind."""
