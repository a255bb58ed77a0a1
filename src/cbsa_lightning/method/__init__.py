"""The method as pure functions and small objects (Eq. 6 to 12): losses, pseudo-labels, contexts, metrics, averages."""
