"""A LoRA that plays at its trained strength in every program that reads LoRAs for ACE-Step 1.5.

Programs differ in where they look for alpha: in ``adapter_config.json`` (PEFT, ACE-Step's app), in a tensor beside
each layer (ComfyUI, Wan2GP), in the header (diffusers), in the first two (acestep.cpp, HOT-Step), or nowhere (DEMON).
Without one they divide nothing: the strength is 1. So here ``alpha / rank`` is multiplied into lora_B, and alpha is the
rank. Ranks that differ from layer to layer are filled up with zeros, because acestep.cpp takes one alpha for all.

What each program does is in ``tests/adapters/readers.py``, with the commit that it was read from.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import Refusal
from ..files import replacing
from ..text import counted, shown
from .facts import SCHEMA_VERSION
from .kinds import Mean, title_of
from .kinds.lora import LORA
from .layers import Adapter
from .new_adapter import write_adapter

if TYPE_CHECKING:
    import torch

_ATTENTION = re.compile(r"layers\.\d+\.(self_attn|cross_attn)\.[qkvo]_proj")


def check_universal(adapter: Adapter) -> None:
    """Refuse an adapter that cannot be made to play everywhere. Raises Refusal."""
    path = adapter.file.path
    if adapter.kind != LORA.name:
        raise Refusal(
            f"{path} is a {title_of(adapter.kind)}, which diffusers and DEMON do not play. Use it in "
            "ACE-Step's app, or export it with --to comfyui."
        )
    LORA.check_comfyui(adapter, list(adapter.layers.values()), None)
    if adapter.unknown:
        raise Refusal(
            f"{path} holds tensors that belong to no LoRA ({shown(adapter.unknown[0], 80)}), so a copy would not work "
            "as trained. Leave them out."
        )
    started = adapter.config.get("init_lora_weights")
    if isinstance(started, str) and started.lower().startswith(("pissa", "olora", "corda", "loftq")):
        raise Refusal(
            f"{path} was begun with init_lora_weights = {shown(started, 40)}, which changes the model's own weights as "
            "well. Only PEFT plays it. Use it there."
        )
    adapter.check_changes_something()


def notes(adapter: Adapter) -> list[str]:
    """What some programs do not play of it, as lines for people."""
    found = []
    if not any(map(_ATTENTION.fullmatch, adapter.layers)):
        found.append("diffusers does not recognise it: it looks for attention layers, and there are none.")
    sizes = adapter.file.tensors
    convolutions = [
        name for name, layer in adapter.layers.items() if any(len(sizes[layer.parts[part]].shape) > 2 for part in "AB")
    ]
    if convolutions:
        found.append(f"acestep.cpp and DEMON leave out {counted(len(convolutions), 'convolution')}: {convolutions[0]}.")
    return found


def write_universal(
    adapter: Adapter, target: Path, facts: Mapping[str, Any] | None, strength: float = 1.0
) -> tuple[int, bool]:
    """Write a universal copy of a LoRA, multiplied by `strength` beside its own, completely or not at all.

    The target is a file (``.safetensors``), or a folder, which ACE-Step's app and PEFT load as well.

    Returns:
        Number of layers that were left out because they change nothing, and whether tensors had to become fp32 to keep
        their values.

    Raises:
        Refusal: it cannot play everywhere.
        OSError: it cannot be read or written.
    """
    import torch

    check_universal(adapter)
    layers = folded(adapter, strength)
    became = any(mean.tensors["B"].dtype != mean.tensors["A"].dtype for mean in layers.values())
    if became:
        layers = {
            name: replace(mean, tensors={part: tensor.to(torch.float32) for part, tensor in mean.tensors.items()})
            for name, mean in layers.items()
        }
    told = dict(facts or {}) | {"schema_version": SCHEMA_VERSION}
    if strength != 1.0:
        told["copy_strength"] = strength
    if target.suffix == ".safetensors":
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".universal.") as folder:
            made = write_adapter(Path(folder) / "adapter", LORA, layers, told, adapter)
            with replacing(target) as stream, made.open("rb") as source:
                while piece := source.read(2**20):
                    stream.write(piece)
    else:
        write_adapter(target, LORA, layers, told, adapter)
    return len(adapter.layers) - len(layers), became


def folded(adapter: Adapter, strength: float = 1.0) -> dict[str, Mean]:
    """The layers with their strengths in lora_B, all of one rank. Layers that change nothing are left out.

    lora_B keeps its dtype if that holds the products exactly, as it does if the strength is a power of two; else it is
    fp32.
    """
    highest = max(adapter.ranks)
    found = {}
    for name, layer in adapter.layers.items():
        if name in adapter.untrained:
            continue
        tensors = adapter.load(layer)
        down, up = tensors["A"], _scaled(tensors["B"], LORA.known_strength(layer) * strength)
        if not bool(down.isfinite().all() and up.isfinite().all()):
            raise Refusal(f"{adapter.file.path} holds NaN or infinity in {shown(name, 80)}. Use an earlier checkpoint.")
        found[name] = Mean(
            {"A": _filled(down, highest, 0), "B": _filled(up, highest, 1)}, highest, float(highest), exact=1.0, kept=1.0
        )
    return found


def _scaled(tensor: torch.Tensor, strength: float) -> torch.Tensor:
    import torch

    exact = tensor.double() * strength
    same = exact.to(tensor.dtype)
    return same if tensor.dtype == torch.float32 or torch.equal(same.double(), exact) else exact.to(torch.float32)


def _filled(tensor: torch.Tensor, rank: int, dimension: int) -> torch.Tensor:
    """The tensor with zeros up to the rank."""
    import torch

    missing = list(tensor.shape)
    missing[dimension] = rank - tensor.shape[dimension]
    return torch.cat([tensor, tensor.new_zeros(missing)], dim=dimension) if missing[dimension] else tensor
