"""Says what to change when a training fails for want of memory, of room on the disk, or of finite numbers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

_NO_MEMORY = ("out of memory", "outofmemory", "cannot allocate memory", "alloc_cpu", "not enough memory")
_NO_ROOM = ("no space left", "disk full", "not enough space", "file write failed", "code: 28", "quota exceeded")
_NO_NUMBERS = ("division by zero", "not finite", "non-finite")


def advice(failure: str, training_config: Any, adapter_config: Any, output: Path) -> str:
    """What to do about a failure that upstream reports, one or two sentences; "" for one that is not known.

    Args:
        failure: upstream's own words.
        training_config, adapter_config: upstream's configurations, whose values are named.
        output: the folder that is saved to.
    """
    text = failure.lower()
    if any(words in text for words in _NO_MEMORY):
        rank = getattr(adapter_config, "r", None) or getattr(adapter_config, "linear_dim", None)
        batch, accumulation = (
            getattr(training_config, name, None) for name in ("batch_size", "gradient_accumulation_steps")
        )
        return (
            f"The memory was not enough. Take a smaller --batch-size (now {batch}) with a higher "
            f"--gradient-accumulation (now {accumulation}), a lower --rank (now {rank}), or close other programs "
            "that use the device."
        )
    if any(words in text for words in _NO_ROOM):
        return f"{room(output)} Make room there, or choose an --output-dir on another disk."
    if any(words in text for words in _NO_NUMBERS):
        rate = getattr(training_config, "learning_rate", None)
        return (
            f"The gradients were not finite numbers. Lower --learning-rate (now {rate}); if it happens at the same "
            "song again, preprocess that song anew."
        )
    return ""


def room(folder: Path) -> str:
    """How much room the disk of a folder has left, as a sentence."""
    place = next((place for place in (folder, *folder.parents) if place.exists()), folder)
    try:
        free = shutil.disk_usage(place).free
    except OSError:
        return f"The disk of {folder} cannot be asked for its room."
    return f"The disk of {folder} has {free / 2**20:,.0f} MB left."
