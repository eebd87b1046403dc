"""Checks the values in an adapter's files. Impossible values are left out, with a note."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any, Final

from ..text import shown
from .facts import FACTS, SCHEMA_VERSION, SWITCHES, TEXT_FACTS
from .kinds import BY_NAME
from .layers import Adapter

_HUGE: Final = 1e15
_COUNTS: Final = ("trained_layers", "songs", "epoch", "global_step", "training_steps")
_WHOLE: Final = frozenset({"num_inference_steps", *_COUNTS})
_RANGES: Final = {
    "shift": (1e-6, _HUGE),
    "num_inference_steps": (1, _HUGE),
    "cfg_ratio": (0.0, 1.0),
    "timestep_sigma": (0.0, _HUGE),
    "rank": (1, _HUGE),
    "alpha": (1e-9, _HUGE),
    "dropout": (0.0, 1.0),
    "crop_seconds": (1e-6, _HUGE),
    "average_energy": (0.0, 1.0),
    **dict.fromkeys(_COUNTS, (0, _HUGE)),
}


def usable(facts: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """The facts in their usual order, without impossible values. Adds a note for each of these."""
    usable = {}
    for key in dict.fromkeys((*FACTS, *facts)):
        value = facts.get(key)
        if value is None or value == "":
            continue
        if _can_be(key, value):
            usable[key] = value
        else:
            notes.append(f"{shown(key, 60)} = {shown(value, 60)} is not a possible value and is ignored.")
    return usable


def _can_be(key: str, value: Any) -> bool:
    """Whether a value is possible for a key. Unknown keys may have numbers, booleans, strings, and lists of these."""
    if isinstance(value, str):
        known = key not in FACTS or key in TEXT_FACTS or key == "target_modules"
        return known and len(value) <= 5000 and not any(unicodedata.category(c) == "Cs" for c in value)
    if key in TEXT_FACTS:
        return False
    if key == "timestep_schedule":
        times = value if isinstance(value, list) else []
        return len(times) > 1 and all(_is_number(t) and 0 < t <= 1 for t in times) and times[1] < 1
    if isinstance(value, list):
        listable = key not in FACTS or (key == "target_modules" and all(isinstance(name, str) for name in value))
        return listable and len(value) <= 1000 and all(not isinstance(one, list) and _can_be("", one) for one in value)
    if key == "target_modules":
        return False
    if isinstance(value, bool):
        return key not in FACTS or key in SWITCHES
    if key in SWITCHES:
        return False
    low, high = _RANGES.get(key, (-_HUGE, _HUGE))
    return _is_number(value) and low <= value <= high and (key not in _WHOLE or isinstance(value, int))


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -_HUGE <= value <= _HUGE  # false for NaN as well


def check_schema(facts: Mapping[str, Any], notes: list[str]) -> None:
    """Add a note if the facts are of an unknown or newer schema version."""
    version = facts.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool) or abs(version) > _HUGE:
        notes.append(f"Its schema_version is {shown(version)}, expected a number. The keys that are known are used.")
    elif version > SCHEMA_VERSION:
        notes.append(
            f"Its facts were written by a newer version of this program (schema {version}, this one knows "
            f"{SCHEMA_VERSION}). The keys that are known are used."
        )


def check_strengths(adapter: Adapter, facts: Mapping[str, Any], notes: list[str]) -> None:
    """Add a note if the files beside the weights give another strength than the header."""
    rank, alpha = facts.get("rank"), facts.get("alpha")
    plain = adapter.kind in BY_NAME and len(adapter.strengths) == 1
    if not plain or not isinstance(rank, int | float) or not isinstance(alpha, int | float) or not rank:
        return
    (strength,) = adapter.strengths
    if abs(alpha / rank - strength) > 1e-6 * strength and not adapter.config.get("use_rslora"):
        notes.append(
            f"It was saved with strength {alpha / rank:.4g}, but {adapter.config_source or 'its tensors'} would give "
            f"it strength {strength:.4g}."
        )
