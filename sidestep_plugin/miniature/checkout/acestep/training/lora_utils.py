"""One question, which the trainer asks here."""

from __future__ import annotations

import importlib.util

__all__ = ["check_peft_available"]


def check_peft_available() -> bool:
    """Whether LoRA can be trained here."""
    return importlib.util.find_spec("peft") is not None
