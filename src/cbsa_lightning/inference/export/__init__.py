"""Export of a trained model as a folder of files that work without this library."""
