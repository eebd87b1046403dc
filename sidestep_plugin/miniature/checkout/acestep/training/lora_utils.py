"""One question, which the trainer asks here."""

from __future__ import annotations

import importlib.util


def check_peft_available() -> bool:
    """Whether LoRA can be trained here."""
    return importlib.util.find_spec("peft") is not None
