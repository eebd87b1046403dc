"""Whether torch can be imported, before anything else fails for want of it and is blamed."""

from __future__ import annotations

import sys

from sidestep_plugin.errors import Refusal
from sidestep_plugin.text import sentence

from .terminal import say_what_takes_long


def require_torch(*, told: bool = False) -> None:
    """Import torch, and say so at a terminal, because it takes seconds.

    Args:
        told: whether that has been said already.

    Raises:
        Refusal: it is not installed, or its libraries cannot be loaded.
    """
    if "torch" in sys.modules:
        return
    if not told:
        say_what_takes_long("Importing torch ...")
    try:
        import torch  # noqa: F401
    except Exception as error:  # a missing library is an OSError, a bad $TORCH_LOGS a ValueError
        first = str(error).strip().partition("\n")[0]
        raise Refusal(
            f"torch cannot be imported in this Python ({sys.executable}): {type(error).__name__}: {sentence(first)} "
            "Use the Python environment in which ACE-Step runs, or install torch again there."
        ) from error
