"""Whether a training has left a better adapter than the finished one: its best epoch on the held-out songs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from .facts import read_training_config

BEST: Final = "checkpoints/best"


def better_than(weights: Path) -> str | None:
    """:func:`better_than_final` for the weights file of a training's finished adapter; None for any other adapter."""
    folder = weights.absolute().parent
    final = folder.parent if folder.name == "adapter" else folder
    return better_than_final(final.parent) if final.name == "final" else None


def better_than_final(output: Path) -> str | None:
    """A sentence when the best adapter in a training's output folder is better than the finished one.

    It has both validations and where the better one is. None if the finished one is as good, or without a validation of
    both on equally many songs.
    """
    best, final = _facts_in(output / BEST), _facts_in(output / "final")
    one, other = (_number(facts.get("validation_change")) for facts in (best, final))
    if one is None or other is None or one >= other or best.get("validation_songs") != final.get("validation_songs"):
        return None
    return (
        f"best (epoch {best.get('epoch')}, {100 * one:+.2f} % on the held-out songs) is better than final (epoch "
        f"{final.get('epoch')}, {100 * other:+.2f} %): {output / BEST}"
    )


def _facts_in(folder: Path) -> Mapping[str, Any]:
    return read_training_config(folder / "adapter") or read_training_config(folder) or {}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
