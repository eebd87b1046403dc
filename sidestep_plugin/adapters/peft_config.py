"""Reads PEFT's configuration of a LoRA, and the alpha that it gives each layer."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ..errors import Refusal
from ..files import read_json_object
from .finding import check_inside, has_neighbours_of_its_own
from .weights_file import WeightsFile

DIFFUSERS_KEY: Final = "lora_adapter_metadata"
"""Header key of a LoRA's configuration in JSON for diffusers (``LORA_ADAPTER_METADATA_KEY`` there)."""
DIFFUSERS_SOURCE: Final = f"header ({DIFFUSERS_KEY})"  # what :func:`find_configuration` calls that place

# Patterns are regular expressions from other people's files, and some of them take forever. Only those are used that
# are made of single characters: "q_proj", "^layers.0.self_attn.q_proj". PEFT reads their dots as any character.
_QUICK: Final = re.compile(r"\^?(?:[\w-]|\\?\.)+\$?")
_LONGEST: Final = 1000  # characters of a layer's name

Patterns = Sequence[tuple[re.Pattern[str], Any]]
"""PEFT's patterns for layers' names in their order, with the value for the layers that match."""


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
            return prefixed, DIFFUSERS_SOURCE, problems
        except (ValueError, RecursionError, AttributeError):
            problems.append(f"{DIFFUSERS_KEY} in the header is not a JSON object.")
    return {}, None, problems


def alpha_patterns(config: Mapping[str, Any]) -> Patterns | None:
    """PEFT's ``alpha_pattern``, ready for :func:`by_pattern`. None if one of its patterns is not used."""
    if unread_pattern(config) is not None:
        return None
    return [(re.compile(rf"(.*\.)?({pattern})$"), value) for pattern, value in _alpha_pattern(config).items()]


def unread_pattern(config: Mapping[str, Any]) -> str | None:
    """The first pattern in ``alpha_pattern`` that could take forever, and so is not used. None if there is none."""
    return next((pattern for pattern in map(str, _alpha_pattern(config)) if _QUICK.fullmatch(pattern) is None), None)


def by_pattern(patterns: Patterns, name: str, default: float | None) -> float | None:
    """PEFT's lookup (``peft.utils.get_pattern_key``): the value of the first pattern that matches a layer's name.

    A pattern matches the whole name, or its end after a dot. So "^q_proj" matches no layer of a decoder, and "q.proj"
    matches q_proj. None if the value is no number above zero, or the name is too long to be matched in a moment.
    """
    if len(name) > _LONGEST:
        return None
    for pattern, value in patterns:
        if pattern.match(name):
            return positive(value)
    return default


def _alpha_pattern(config: Mapping[str, Any]) -> Mapping[str, Any]:
    patterns = config.get("alpha_pattern")
    return patterns if isinstance(patterns, Mapping) else {}


def plain_number(number: float | None) -> float | int | None:
    """A number without a fraction as a whole one, for JSON."""
    return int(number) if number is not None and float(number).is_integer() else number


def positive(value: Any) -> float | None:
    """A value as a finite number above zero. None if it is not one."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and number > 0 else None
