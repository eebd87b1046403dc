"""Says what to change when a training fails because memory or disk ran out, or a gradient was NaN."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

_NO_MEMORY = ("out of memory", "outofmemory", "cannot allocate memory", "alloc_cpu", "not enough memory")
_NO_ROOM = ("no space left", "disk full", "not enough space", "file write failed", "code: 28", "quota exceeded")
_NO_NUMBERS = ("division by zero", "not finite", "non-finite")


def advice(failure: str, training_config: Any, adapter_config: Any, output: Path) -> str:
    """What to do about a failure that upstream reports, in one or two sentences; "" for an unknown failure.

    Args:
        failure: upstream's own words.
        training_config, adapter_config: upstream's configurations; the advice names their values.
        output: the output folder.
    """
    text = failure.lower()
    if any(words in text for words in _NO_MEMORY):
        rank = getattr(adapter_config, "r", None) or getattr(adapter_config, "linear_dim", None)
        batch, accumulation = (
            getattr(training_config, name, None) for name in ("batch_size", "gradient_accumulation_steps")
        )
        return (
            f"The device ran out of memory. Lower --batch-size (now {batch}) and raise --gradient-accumulation "
            f"(now {accumulation}), lower --rank (now {rank}), or close other programs that use the device."
        )
    if any(words in text for words in _NO_ROOM):
        return f"{room(output)} Free some space, or choose an --output-dir on another disk."
    if any(words in text for words in _NO_NUMBERS):
        rate = getattr(training_config, "learning_rate", None)
        return (
            f"The gradients were NaN or infinite. Lower --learning-rate (now {rate}); if the same song causes "
            "it again, preprocess that song again."
        )
    return ""


def room(folder: Path) -> str:
    """How much free space the disk of a folder has, as a sentence."""
    place = next((place for place in (folder, *folder.parents) if place.exists()), folder)
    try:
        free = shutil.disk_usage(place).free
    except OSError:
        return f"The free space on the disk of {folder} is not known."
    return f"The disk of {folder} has {free / 2**20:,.0f} MB free."
