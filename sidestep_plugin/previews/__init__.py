"""Clips from a model with its adapter: conditions, generation, decoding, WAV files, and the page that plays them."""
