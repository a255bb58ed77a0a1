"""Images to labels with a trained model, without Lightning."""
