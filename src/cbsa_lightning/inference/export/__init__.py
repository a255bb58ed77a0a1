"""Export of a trained model to a folder of files that work without this library."""
