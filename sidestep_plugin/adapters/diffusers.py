"""The configuration that diffusers needs to load a LoRA at full strength."""

from __future__ import annotations

from collections import Counter
from typing import Any

from .kinds.lora import LORA
from .layer_names import in_diffusers, target_in_diffusers
from .layers import Adapter


def diffusers_config(adapter: Adapter) -> dict[str, Any] | None:
    """The configuration for the header of a LoRA. None for other adapters, and if an alpha is unknown.

    diffusers passes the entries with the prefix ``transformer.`` to PEFT's ``LoraConfig``, which refuses unknown ones.
    It also renames the layers, so ranks and alphas that differ are listed under the layers' full names in diffusers.
    """
    layers = [layer for layer in adapter.layers.values() if layer.rank]
    if adapter.kind != LORA.name or not layers or any(layer.alpha is None for layer in layers):
        return None
    rank = Counter(layer.rank for layer in layers).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers).most_common(1)[0][0]
    entries = {
        "r": rank,
        "lora_alpha": _whole(alpha),
        "target_modules": sorted({target_in_diffusers(layer.name) for layer in layers}),
        "rank_pattern": {in_diffusers(layer.name): layer.rank for layer in layers if layer.rank != rank},
        "alpha_pattern": {in_diffusers(layer.name): _whole(layer.alpha) for layer in layers if layer.alpha != alpha},
        "use_dora": adapter.is_dora,
    }
    return {f"transformer.{name}": value for name, value in entries.items()}


def _whole(number: float | None) -> float | int | None:
    return int(number) if number is not None and number == int(number) else number
