"""The weights of a base model's decoder, one layer at a time: what an adapter that scales them cannot do without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import Refusal
from .targets import own_name
from .weights_file import read_weights_file

if TYPE_CHECKING:
    import torch

BaseWeights = Callable[[str], "torch.Tensor | None"]
"""Gives a layer's weight in fp32 on the CPU, by its name in the decoder; None if there is no such layer."""

_PREFIX = "decoder."


def weights_in_folder(folder: Path) -> BaseWeights:
    """The weights in the safetensors files of a model's folder, each read when it is asked for. Raises Refusal."""
    files = {
        name.removeprefix(_PREFIX).removesuffix(".weight"): file
        for file in sorted(folder.glob("*.safetensors"))
        if not file.name.startswith(".")
        for name in read_weights_file(file).tensors
        if name.startswith(_PREFIX) and name.endswith(".weight")
    }
    if not files:
        raise Refusal(f"No weights of a decoder in {folder}. Expected the folder of an ACE-Step 1.5 model.")

    def weight(layer: str) -> torch.Tensor | None:
        from safetensors import safe_open

        if layer not in files:
            return None
        with safe_open(files[layer], framework="pt") as weights:
            found: torch.Tensor = weights.get_tensor(f"{_PREFIX}{layer}.weight")
        return found.float()

    return weight


def weights_of_model(model: Any) -> BaseWeights:
    """The weights of a loaded model. LyCORIS leaves them as they are while it trains."""
    modules = {own_name(name): module for name, module in model.decoder.named_modules()}

    def weight(layer: str) -> torch.Tensor | None:
        found = getattr(modules.get(layer), "weight", None)
        return None if found is None else found.detach().float().cpu()

    return weight
