"""The configuration from which diffusers plays a LoRA at its trained strength."""

from __future__ import annotations

from collections import Counter
from typing import Any

from .layer_names import in_diffusers, target_in_diffusers
from .layers import Adapter


def diffusers_config(adapter: Adapter) -> dict[str, Any] | None:
    """What diffusers needs to play a LoRA at its trained strength, None when that is not known.

    diffusers gives the entries under the prefix ``transformer.`` to PEFT's ``LoraConfig``, which refuses unknown ones,
    and it renames the layers; so ranks and alphas that differ are listed by the layers' full names there.
    """
    layers = [layer for layer in adapter.layers.values() if layer.rank]
    if adapter.kind != "lora" or not layers or any(layer.alpha is None for layer in layers):
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
