"""A copy of an adapter as one file that ComfyUI plays at the trained strength.

Rules of ComfyUI that it relies on (``comfy/lora.py`` and ``comfy/weight_adapter/`` of Comfy-Org/ComfyUI):

- ACE-Step 1.5's decoder layers are found under ``base_model.model.LAYER`` (pull request 12252) and, with underscores
  for dots, ``lycoris_LAYER`` (pull request 12665).
- A LoRA is ``LAYER.lora_A.weight`` and ``LAYER.lora_B.weight``; its strength is ``LAYER.alpha`` divided by the rank,
  and 1 without that tensor. Neither the header nor ``adapter_config.json`` is read.
- A LoKr has its alpha among its tensors already; a factor that is not decomposed plays at strength 1. The second
  factor of a convolution has to be flat.
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
"""What the copy is called beside an adapter."""


def write_comfyui_copy(adapter: Adapter, target: Path, facts: Mapping[str, Any] | None) -> None:
    """Write the copy, whole or not at all.

    Layers that change nothing are left out. ComfyUI could not load some of them, and the result is the same.

    Args:
        adapter: the adapter, which stays as it is.
        target: the file to write; one that is there is replaced.
        facts: what is known of the adapter, for the header; None leaves the header that it has.

    Raises:
        Refusal: the adapter cannot be played as trained by ComfyUI, or its alpha is not known. Nothing is written.
        OSError: the file cannot be written; one that was there is as it was.
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
    """Raise Refusal when ComfyUI could not play an adapter as it was trained."""
    path = adapter.file.path
    if adapter.kind not in FILE_NAMES:
        raise Refusal(f"{path} is a {adapter.kind}; only LoRA and LoKr can be exported.")
    if adapter.unknown:
        raise Refusal(
            f"{path} holds tensors that ComfyUI would leave out ({shown(adapter.unknown[0], 80)}), so a copy would not "
            "play as trained."
        )
    for layer in adapter.layers.values():
        flat = any(key.startswith(("lora_unet_", "lycoris_")) for key in layer.parts.values())
        if adapter.kind == "lora" and flat and not is_known_layer(layer.name):
            raise Refusal(
                f"{path} adapts {shown(layer.name, 80)}, which is no layer that ComfyUI knows in ACE-Step 1.5. "
                "Use it in ACE-Step's app."
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
            f"{path} is a DoRA. ComfyUI scales DoRA by other norms than PEFT, so a copy would not play as trained. "
            "Use it in ACE-Step's app or in diffusers."
        )
    for layer in adapter.layers.values():
        shapes = [adapter.file.tensors[layer.parts[part]].shape for part in ("A", "B") if part in layer.parts]
        if len(shapes) < 2 or any(len(shape) < 2 for shape in shapes) or shapes[0][0] != shapes[1][1]:
            raise Refusal(
                f"lora_A and lora_B of {shown(layer.name)} in {path} do not belong together: it is damaged. Copy or "
                "download it again."
            )
    pattern = unread_pattern(adapter.config)
    if pattern is not None and not all("alpha" in layer.parts for layer in adapter.layers.values()):
        raise Refusal(
            f"{path} has the alpha_pattern '{shown(pattern, 100)}'. That is a regular expression and is not read, so the "
            "alphas are not known. Put the layers' names into alpha_pattern, or use the adapter in ACE-Step's app."
        )
    if any(layer.alpha is None for layer in adapter.layers.values()):
        raise Refusal(
            f"The alpha of {path} is not known, so neither is its strength. Put its adapter_config.json beside it, or "
            "say it: --alpha NUMBER."
        )


def _check_lokr(adapter: Adapter) -> None:
    path, tensors = adapter.file.path, adapter.file.tensors
    for layer in _trained(adapter):
        if "alpha" not in layer.parts:
            raise Refusal(
                f"{path} has no alpha among its tensors, so ComfyUI would not play it as it was trained. Use it in "
                "ACE-Step's app."
            )
        if "lokr_t2" in layer.parts:
            raise Refusal(
                f"{path} is a LoKr with a Tucker decomposition, which ComfyUI does not play for ACE-Step. Use it in "
                "ACE-Step's app."
            )
        if "magnitude" in layer.parts and tensors[layer.parts["magnitude"]].shape[:1] != (1,):
            raise Refusal(
                f"{path} is a LoKr with weight decomposition (DoRA). ComfyUI scales it by other norms than LyCORIS, so "
                "no copy would play exactly as trained. ComfyUI loads the file itself, at about its strength."
            )


def _trained(adapter: Adapter) -> list[Layer]:
    return [layer for name, layer in adapter.layers.items() if name not in adapter.idle]


def _header(file: WeightsFile, facts: Mapping[str, Any] | None) -> dict[str, str]:
    header = dict(file.metadata) if facts is None else header_of(file, facts)
    # With alpha among the tensors diffusers does not load the file, so its key would promise too much.
    header.pop(DIFFUSERS_KEY, None)
    if any(key.startswith("modelspec.") for key in header):
        header[HASH_KEY] = ""
    return header
