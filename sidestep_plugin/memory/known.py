"""Sizes of the official models, for an estimate before a model is downloaded.

Those of the 2B models are the defaults of their config class. Those of the XL models that no file of ACE-Step's code
says are guesses: see :data:`GUESSED`.
"""

from __future__ import annotations

from typing import Final

from ..variants import MODEL_ALIASES, words_of
from .sizes import DecoderSize

TWO_B: Final = DecoderSize(
    width=2048, condition_width=2048, feed_forward=6144, layers=24, heads=16, key_value_heads=8, head_dim=128
)
"""acestep-v15-turbo, -base, -sft and their variants: 1,575,458,880 parameters."""

XL: Final = DecoderSize(
    width=2560, condition_width=2048, feed_forward=9728, layers=32, heads=32, key_value_heads=8, head_dim=128
)
"""acestep-v15-xl-*. ACE-Step's code says 32 layers, 32 heads, and 2560 and 2048 channels."""

GUESSED: Final = "the width of XL's MLP (9728), its key-value heads (8) and their width (128), as in Qwen3-4B"
"""What is guessed about XL. With it the decoder has 4.2 billion parameters, which fits ACE-Step's own 4B and 9 GB."""


def known_size(model: str) -> DecoderSize | None:
    """The size of an official model by alias or folder name; None for any other, whatever its name holds."""
    folder = MODEL_ALIASES.get(model, model)
    if folder not in MODEL_ALIASES.values():
        return None
    return XL if "xl" in words_of(folder) else TWO_B
