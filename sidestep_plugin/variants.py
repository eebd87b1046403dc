"""The official models: their names, their variants, and the settings to generate with. Pure."""

from __future__ import annotations

import re
from typing import Final, Literal

Variant = Literal["turbo", "base", "sft"]

VARIANTS: Final[tuple[Variant, ...]] = ("turbo", "base", "sft")

TURBO_SHIFT: Final = 3.0
"""Shift of the 8-step schedule in upstream's trainer, and of every turbo model except turbo-shift1."""
TURBO_STEPS: Final = 8
"""Number of denoising steps that the turbo models were distilled for."""

MODEL_ALIASES: Final = {
    alias: f"acestep-v15-{alias}"
    for alias in (
        "turbo", "turbo-shift1", "turbo-shift3", "turbo-continuous", "base", "sft", "xl-turbo", "xl-base", "xl-sft",
    )
}  # fmt: skip
"""Folder names of the official models by their short names."""


def words_of(name: str) -> list[str]:
    """Whole words of a folder's name: "acestep-v15-XL_turbo.shift1" gives acestep, v15, xl, turbo, shift1."""
    return [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]


def inference_settings(variant: Variant, model_name: str = "") -> tuple[float, int]:
    """Shift and number of steps to generate with, for a variant; turbo models also differ by name.

    turbo-shift1 was distilled at shift 1, every other turbo model works at 3; base and sft take 50 steps at shift 1.
    """
    if variant != "turbo":
        return 1.0, 50
    return 1.0 if "shift1" in words_of(model_name) else TURBO_SHIFT, TURBO_STEPS


def member_of(variant: str, model_name: str) -> str:
    """The variant, or the turbo model that the name means, such as "turbo-shift1", which has other settings."""
    words = words_of(model_name) if variant == "turbo" else []
    return next((f"turbo-{word}" for word in ("shift1", "shift3", "continuous") if word in words), variant)


def guidance(variant: object) -> str:
    """Whether to generate with classifier-free guidance: turbo is distilled to work without it."""
    return "off" if variant == "turbo" else "on"
