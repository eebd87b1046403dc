"""The folder of preprocessed songs: what is in it, and whether it fits a model."""
