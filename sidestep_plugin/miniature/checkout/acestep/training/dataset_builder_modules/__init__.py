"""Preprocessing of audio into songs: the functions that the dataset builder calls."""
