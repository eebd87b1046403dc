"""Checks names of target modules against the model's layers, by the rules of PEFT and of upstream's LoKr."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import Refusal
from ..text import shown
from .kinds import BY_NAME
from .kinds.lora import LORA


def check_targets(layers: Iterable[str], targets: Sequence[str], kind: str) -> None:
    """Refuse names of target modules that match none of the decoder's layers, which have their full names.

    PEFT ignores such a name as long as another one matches, and upstream's LoKr trains all layers if none does. Raises
    Refusal.
    """
    known = list(layers)
    matches = BY_NAME[kind].matches
    wrong = [name for name in targets if not any(matches(layer, name) for layer in known)]
    if wrong:
        named = ", ".join(repr(shown(name, 60)).replace("\\\\", "\\") for name in wrong[:5])
        exist = ", ".join(dict.fromkeys(_short(layer) for layer in known))
        raise Refusal(f"--target-modules: no layer of this model is called {named}. Choose from {shown(exist, 250)}.")


def trained_shapes(model: Any, kind: str, adapter_config: Any) -> dict[str, tuple[int, int]]:
    """Rows and columns of the linear layers that an adapter's target modules mean, by name; {} without a decoder.

    The model's decoder may carry the adapter already.
    """
    import torch

    targets, decoder = getattr(adapter_config, "target_modules", None), getattr(model, "decoder", None)
    if not isinstance(decoder, torch.nn.Module) or not targets or isinstance(targets, str):
        return {}
    shapes = {}
    for prefixed, module in decoder.named_modules():
        name = own_name(prefixed)
        if isinstance(module, torch.nn.Linear) and any(BY_NAME[kind].matches(name, str(target)) for target in targets):
            shapes[name] = (module.out_features, module.in_features)
    return shapes


def own_name(layer: str) -> str:
    """A layer's name in the decoder, from its name in the models that PEFT, Fabric and torch put around it."""
    return re.sub(r"^((base_model\.model|_forward_module|module)\.)+", "", layer)


def is_target(layer: str, targets: Sequence[str] | str | None) -> bool:
    """Whether PEFT attaches a LoRA to a layer of this name, by its rules for a list of names and for one expression."""
    if isinstance(targets, str):
        return re.fullmatch(targets, layer) is not None
    return any(LORA.matches(layer, str(name)) for name in targets or ())


def _short(layer: str) -> str:
    """The last part of a layer's name, with the part before it if it is a number."""
    before, _, last = layer.rpartition(".")
    return f"{before.rpartition('.')[2]}.{last}" if last.isdigit() and before else last
