"""Reads PEFT's configuration of a LoRA, and the alpha that it gives each layer."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, Final

from ..errors import Refusal
from ..files import read_json_object
from .finding import check_inside, has_neighbours_of_its_own
from .layer_names import in_diffusers
from .weights_file import WeightsFile

DIFFUSERS_KEY: Final = "lora_adapter_metadata"
"""Header key of a LoRA's configuration in JSON for diffusers (``LORA_ADAPTER_METADATA_KEY`` there)."""

# Patterns are regular expressions from other people's files, which may take forever. Only plain names are read.
_NAME_PATTERN: Final = re.compile(r"\^?((?:[\w-]|\\?\.)+)\$?")


def find_configuration(file: WeightsFile) -> tuple[dict[str, Any], str | None, list[str]]:
    """PEFT's configuration of an adapter, the place where it was found, and the problems with it."""
    problems: list[str] = []
    beside = file.path.parent / "adapter_config.json"
    if (beside.is_file() or beside.is_symlink()) and has_neighbours_of_its_own(file.path):
        try:
            check_inside(beside, beside.parent)
            return read_json_object(beside), beside.name, problems
        except Refusal as refusal:
            problems.append(str(refusal))
        except (OSError, ValueError) as error:
            problems.append(f"{beside.name} cannot be read: {error}.")
    text = file.metadata.get(DIFFUSERS_KEY)
    if text is not None:
        try:
            value = json.loads(text)
            prefixed = {str(key).removeprefix("transformer."): entry for key, entry in value.items()}
            return prefixed, f"header ({DIFFUSERS_KEY})", problems
        except (ValueError, RecursionError, AttributeError):
            problems.append(f"{DIFFUSERS_KEY} in the header is not a JSON object.")
    return {}, None, problems


def alpha_patterns(config: Mapping[str, Any]) -> dict[str, tuple[int, Any]] | None:
    """PEFT's alpha_pattern by plain names, with their order. None if one of them is not a plain name."""
    patterns = config.get("alpha_pattern")
    found: dict[str, tuple[int, Any]] = {}
    for order, (pattern, value) in enumerate(patterns.items() if isinstance(patterns, Mapping) else ()):
        name = _NAME_PATTERN.fullmatch(str(pattern))
        if name is None:
            return None
        found.setdefault(name[1].replace("\\", ""), (order, value))
    return found


def unread_pattern(config: Mapping[str, Any]) -> str | None:
    """The first pattern in alpha_pattern that is not a plain name, and so is not read. None if there is none."""
    patterns = config.get("alpha_pattern")
    names = map(str, patterns) if isinstance(patterns, Mapping) else iter(())
    return next((name for name in names if _NAME_PATTERN.fullmatch(name) is None), None)


def by_pattern(patterns: Mapping[str, tuple[int, Any]], name: str, default: float | None) -> float | None:
    """PEFT's lookup: the value of the first pattern that is the layer's name, or its end after a dot."""
    matching = []
    for candidate in (name, in_diffusers(name)):
        parts = candidate.split(".")
        ends = (".".join(parts[start:]) for start in range(min(len(parts), 16)))
        matching += [patterns[end] for end in ends if end in patterns]
    return positive(min(matching, key=lambda match: match[0])[1]) if matching else default


def positive(value: Any) -> float | None:
    """A value as a finite number above zero. None if it is not one."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and number > 0 else None
