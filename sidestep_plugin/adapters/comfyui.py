"""Writes a copy of an adapter that works in ComfyUI at full strength.

The copy relies on these rules of ComfyUI (``comfy/lora.py`` and ``comfy/weight_adapter/`` of Comfy-Org/ComfyUI):

- ACE-Step 1.5's decoder layers are found under ``base_model.model.LAYER`` (pull request 12252) and, with underscores
  for dots, ``lycoris_LAYER`` (pull request 12665).
- A LoRA layer is ``LAYER.lora_A.weight`` and ``LAYER.lora_B.weight``. Its strength is ``LAYER.alpha`` divided by the
  rank, or 1 without that tensor. ComfyUI reads neither the header nor ``adapter_config.json``.
- A LoKr already has its alpha among its tensors. A layer with no decomposed factor has strength 1. The second factor of
  a convolution must be flat.
- A layer with ``LAYER.dora_scale`` of one number a row is scaled by that number divided by the norm of the row as it
  was, where LyCORIS divides by the norm of the changed row. So a copy has other numbers, for which the weights are
  needed.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ..errors import Refusal
from ..text import shown
from .base_weights import BaseWeights
from .header import header_of
from .kinds import BY_NAME, KINDS
from .layers import Adapter, Layer
from .peft_config import DIFFUSERS_KEY
from .weights_file import HASH_KEY, NewTensor, WeightsFile, write_copy

FILE_NAMES: Final = {kind.name: kind.copy_name for kind in KINDS}
"""File name of the copy beside an adapter, by adapter type."""


def write_comfyui_copy(
    adapter: Adapter,
    target: Path,
    facts: Mapping[str, Any] | None,
    base: BaseWeights | None = None,
    strength: float = 1.0,
) -> int:
    """Write the copy, completely or not at all. Returns the number of layers that were left out.

    Layers that change nothing are left out: some of them crash ComfyUI's bypass loader, and the result is the same. The
    copy is multiplied by `strength`, beside its own. Without `facts` it has the adapter's own header. Some adapters
    cannot be copied without the weights of their base model.

    Raises:
        Refusal: ComfyUI cannot apply the adapter as it was trained, or its alpha is unknown, or the base model is
            another one. Nothing is written.
        OSError: the file cannot be written. An existing file is not changed.
    """
    check_exportable(adapter, base)
    kind = BY_NAME[adapter.kind]
    tensors: dict[str, NewTensor] = {}
    left_out = len(adapter.idle)
    for layer in _trained(adapter):
        changed = {} if base is None else kind.comfyui_changes(adapter, layer, base)
        if changed is not None and strength != 1.0:
            changed |= kind.comfyui_scaled(adapter, layer, strength)
        if changed is None:
            left_out += 1
            continue
        name, names = kind.comfyui_names(layer)
        if "alpha" not in names:
            assert layer.alpha is not None
            tensors[f"{name}.alpha"] = NewTensor("F32", (), struct.pack("<f", layer.alpha * strength))
        for part, suffix in names.items():
            if part in changed:
                tensors[f"{name}.{suffix}"] = changed[part]
                continue
            entry = adapter.file.tensors[layer.parts[part]]
            flat = part == "lokr_w2" and len(entry.shape) > 2
            shape = (entry.shape[0], math.prod(entry.shape[1:])) if flat else entry.shape
            tensors[f"{name}.{suffix}"] = NewTensor(entry.dtype, shape, entry)
    told = None if facts is None or strength == 1.0 else dict(facts) | {"copy_strength": strength}
    write_copy(adapter.file, target, tensors, _header(adapter.file, told or facts))
    return left_out


def check_exportable(adapter: Adapter, base: BaseWeights | None = None) -> None:
    """Raise Refusal if ComfyUI cannot apply an adapter as it was trained, with a base model's weights or without."""
    path = adapter.file.path
    kind = BY_NAME.get(adapter.kind)
    if kind is None:
        known = " and ".join(kind.title for kind in KINDS)
        raise Refusal(f"{path} is a {adapter.kind}. Only {known} can be exported.")
    if adapter.unknown:
        raise Refusal(
            f"{path} holds tensors that ComfyUI would ignore ({shown(adapter.unknown[0], 80)}), so a copy would not "
            "work as trained."
        )
    adapter.check_changes_something()
    kind.check_comfyui(adapter, _trained(adapter), base)


def _trained(adapter: Adapter) -> list[Layer]:
    return [layer for name, layer in adapter.layers.items() if name not in adapter.idle]


def _header(file: WeightsFile, facts: Mapping[str, Any] | None) -> dict[str, str]:
    header = dict(file.metadata) if facts is None else header_of(file, facts)
    # diffusers refuses a file with alpha tensors, so its key must not be in there.
    header.pop(DIFFUSERS_KEY, None)
    if any(key.startswith("modelspec.") for key in header):
        header[HASH_KEY] = ""
    return header
