"""The adapter's files: what is in them, what they say about the training, and copies for other programs."""
