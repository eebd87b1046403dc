"""Writes a copy of an adapter that works in ComfyUI at full strength.

The copy relies on these rules of ComfyUI (``comfy/lora.py`` and ``comfy/weight_adapter/`` of Comfy-Org/ComfyUI):

- ACE-Step 1.5's decoder layers are found under ``base_model.model.LAYER`` (pull request 12252) and, with underscores
  for dots, ``lycoris_LAYER`` (pull request 12665).
- A LoRA layer is ``LAYER.lora_A.weight`` and ``LAYER.lora_B.weight``. Its strength is ``LAYER.alpha`` divided by the
  rank, or 1 without that tensor. ComfyUI reads neither the header nor ``adapter_config.json``.
- A LoKr already has its alpha among its tensors. A layer with no decomposed factor has strength 1. The second factor of
  a convolution must be flat.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ..errors import Refusal
from ..text import shown
from .header import header_of
from .layer_names import is_known_layer
from .layers import Adapter, Layer
from .peft_config import DIFFUSERS_KEY, unread_pattern
from .weights_file import HASH_KEY, NewTensor, WeightsFile, write_copy

FILE_NAMES: Final = {"lora": "comfyui_lora.safetensors", "lokr": "comfyui_lokr.safetensors"}
"""File name of the copy beside an adapter, by adapter type."""


def write_comfyui_copy(adapter: Adapter, target: Path, facts: Mapping[str, Any] | None) -> None:
    """Write the copy, completely or not at all.

    Layers that change nothing are left out: some of them crash ComfyUI's bypass loader, and the result is the same.

    Args:
        adapter: the adapter. It is not changed.
        target: the file to write. An existing file is replaced.
        facts: what is known about the adapter, for the header. None keeps the adapter's own header.

    Raises:
        Refusal: ComfyUI cannot apply the adapter as it was trained, or its alpha is unknown. Nothing is written.
        OSError: the file cannot be written. An existing file is not changed.
    """
    check_exportable(adapter)
    tensors: dict[str, NewTensor] = {}
    for layer in _trained(adapter):
        if adapter.kind == "lora":
            assert layer.alpha is not None
            name = f"base_model.model.{layer.name}"
            tensors[f"{name}.alpha"] = NewTensor("F32", (), struct.pack("<f", layer.alpha))
            names = {"A": "lora_A.weight", "B": "lora_B.weight"}
        else:
            name = f"lycoris_{layer.name.replace('.', '_')}"
            names = {part: "dora_scale" if part == "magnitude" else part for part in layer.parts}
        for part, suffix in names.items():
            entry = adapter.file.tensors[layer.parts[part]]
            flat = part == "lokr_w2" and len(entry.shape) > 2
            shape = (entry.shape[0], math.prod(entry.shape[1:])) if flat else entry.shape
            tensors[f"{name}.{suffix}"] = NewTensor(entry.dtype, shape, entry)
    write_copy(adapter.file, target, tensors, _header(adapter.file, facts))


def check_exportable(adapter: Adapter) -> None:
    """Raise Refusal if ComfyUI cannot apply an adapter as it was trained."""
    path = adapter.file.path
    if adapter.kind not in FILE_NAMES:
        raise Refusal(f"{path} is a {adapter.kind}. Only LoRA and LoKr can be exported.")
    if adapter.unknown:
        raise Refusal(
            f"{path} holds tensors that ComfyUI would ignore ({shown(adapter.unknown[0], 80)}), so a copy would not "
            "work as trained."
        )
    for layer in adapter.layers.values():
        flat = any(key.startswith(("lora_unet_", "lycoris_")) for key in layer.parts.values())
        if adapter.kind == "lora" and flat and not is_known_layer(layer.name):
            raise Refusal(
                f"{path} adapts {shown(layer.name, 80)}, a layer that ComfyUI does not know in ACE-Step 1.5. Use it in "
                "ACE-Step's app."
            )
    if not _trained(adapter):
        raise Refusal(
            f"{path} holds only zeros and changes nothing, so there is nothing to copy. Use a later checkpoint."
        )
    if adapter.kind == "lokr":
        _check_lokr(adapter)
        return
    if adapter.is_dora:
        raise Refusal(
            f"{path} is a DoRA. ComfyUI scales DoRA by different norms than PEFT, so a copy would not work as trained. "
            "Use it in ACE-Step's app or in diffusers."
        )
    for layer in adapter.layers.values():
        shapes = [adapter.file.tensors[layer.parts[part]].shape for part in ("A", "B") if part in layer.parts]
        if len(shapes) < 2 or any(len(shape) < 2 for shape in shapes) or shapes[0][0] != shapes[1][1]:
            raise Refusal(
                f"{path} is damaged: lora_A and lora_B of {shown(layer.name)} do not fit together. Copy or download it "
                "again."
            )
    pattern = unread_pattern(adapter.config)
    if pattern is not None and not all("alpha" in layer.parts for layer in adapter.layers.values()):
        raise Refusal(
            f"{path} has the alpha_pattern '{shown(pattern, 100)}'. Regular expressions are not read, so the alphas "
            "are unknown. Put the layers' names into alpha_pattern, or use the adapter in ACE-Step's app."
        )
    if any(layer.alpha is None for layer in adapter.layers.values()):
        raise Refusal(
            f"The alpha of {path} is unknown, and so is its strength. Put its adapter_config.json beside it, or pass "
            "--alpha NUMBER. Expected the alpha that it was trained with."
        )


def _check_lokr(adapter: Adapter) -> None:
    path, tensors = adapter.file.path, adapter.file.tensors
    for layer in _trained(adapter):
        if "alpha" not in layer.parts:
            raise Refusal(
                f"{path} has no alpha among its tensors, so it would not work as trained in ComfyUI. Use it in "
                "ACE-Step's app."
            )
        if "lokr_t2" in layer.parts:
            raise Refusal(
                f"{path} is a LoKr with a Tucker decomposition, which ComfyUI does not support for ACE-Step. Use it in "
                "ACE-Step's app."
            )
        if "magnitude" in layer.parts and tensors[layer.parts["magnitude"]].shape[:1] != (1,):
            raise Refusal(
                f"{path} is a LoKr with weight decomposition (DoRA). ComfyUI scales it by different norms than "
                "LyCORIS, so no copy would work exactly as trained. Use the file itself in ComfyUI, which has about "
                "the right strength."
            )


def _trained(adapter: Adapter) -> list[Layer]:
    return [layer for name, layer in adapter.layers.items() if name not in adapter.idle]


def _header(file: WeightsFile, facts: Mapping[str, Any] | None) -> dict[str, str]:
    header = dict(file.metadata) if facts is None else header_of(file, facts)
    # diffusers refuses a file with alpha tensors, so its key must not be in there.
    header.pop(DIFFUSERS_KEY, None)
    if any(key.startswith("modelspec.") for key in header):
        header[HASH_KEY] = ""
    return header
