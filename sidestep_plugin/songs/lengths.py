"""How long songs are, read from the shapes of their tensors: nothing else of a file is read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .one_song import load_song


def longest(files: Iterable[Path]) -> tuple[int, int]:
    """The most frames of latents that one of the songs has, and the most tokens of a condition; (0, 0) for none.

    Files that cannot be read are left out: whatever trains on them refuses them.
    """
    frames = tokens = 0
    for file in files:
        try:
            song = load_song(file)
            frames = max(frames, len(song["target_latents"]))
            tokens = max(tokens, len(song["encoder_hidden_states"]))
        except Exception:  # torch raises a dozen types for a damaged file
            continue
    return frames, tokens
