"""Applies a saved adapter to a loaded decoder while it is evaluated, without PEFT or LyCORIS.

Each adapted layer gets a forward hook that adds what the adapter adds. The base weights are not touched, so nothing is
rounded and several adapters can be applied to one model in turn. The operations and their order are those of PEFT's
``lora.Linear`` (``out + B(A(x)) * alpha / rank``) and of LyCORIS' ``LokrModule`` (``out + x ((W + dW) - W)^T`` with
``dW = kron(w1, w2) * alpha / rank``, whose strength is 1 when no factor is decomposed).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import Refusal
from ..text import shown
from .kinds import BY_NAME, KINDS
from .layers import Adapter

if TYPE_CHECKING:
    import torch

Shapes = Mapping[str, tuple[int, ...]]


def check_applicable(adapter: Adapter, shapes: Shapes, model: str, *, strengths: Sequence[float] = (1.0,)) -> None:
    """Refuse an adapter that cannot be applied to a model's decoder, or be multiplied by `strengths` beside its own.

    `shapes` are those of the decoder's weights by layer; {} if they are not known yet. Raises Refusal.
    """
    path = adapter.file.path
    kind = BY_NAME.get(adapter.kind)
    if kind is None:
        known = " or ".join(kind.title for kind in KINDS)
        raise Refusal(f"{path} is a {adapter.kind}. Expected a {known}. Leave it out.")
    if adapter.is_dora and any(strength != 1.0 for strength in strengths):
        raise Refusal(
            f"{path} has weight decomposition (DoRA), which every program scales in another way. Leave --strengths out."
        )
    for name, layer in adapter.layers.items():
        if name in adapter.idle:
            continue
        if kind.strength(layer) is None:
            raise adapter.unknown_alpha()
        if "lokr_t2" in layer.parts:
            raise Refusal(f"{path} is a LoKr with a Tucker decomposition, which cannot be compared. Leave it out.")
        wanted = shapes.get(name)
        found = kind.shape({part: adapter.file.tensors[key].shape for part, key in layer.parts.items()})
        if shapes and wanted is None:
            raise Refusal(
                f"{path} adapts {shown(name, 80)}, a layer that {model} does not have: it is for another model. Leave "
                "it out, or name its model with --model."
            )
        if found is None or (wanted is not None and found != (wanted[0], wanted[1])):
            there = "tensors that do not fit together" if found is None else f"a weight of {found[0]} x {found[1]}"
            has = "" if wanted is None else f", {model} has {wanted[0]} x {wanted[1]}"
            raise Refusal(
                f"{path} has {there} for {shown(name, 80)}{has}: it is damaged, or for a model of another width. "
                "Leave it out, or name its model with --model."
            )


def linear_layers(decoder: torch.nn.Module) -> dict[str, Any]:
    """The decoder's linear layers by name, before anything wraps them."""
    import torch

    return {name: layer for name, layer in decoder.named_modules() if isinstance(layer, torch.nn.Linear)}


@contextmanager
def applied(adapter: Adapter, layers: Mapping[str, torch.nn.Module], strength: float = 1.0) -> Iterator[None]:
    """Apply an adapter that :func:`check_applicable` has accepted to the decoder's own layers in this block.

    It is multiplied by `strength`, beside its own.
    """
    from safetensors import safe_open

    kind, handles = BY_NAME[adapter.kind], []
    try:
        with safe_open(adapter.file.path, framework="pt") as weights:
            for name, layer in adapter.layers.items():
                if name not in adapter.idle:
                    tensors = {part: weights.get_tensor(key) for part, key in layer.parts.items()}
                    if strength != 1.0:
                        tensors = kind.scaled(tensors, strength)
                    handles.append(layers[name].register_forward_hook(kind.hook(layer, tensors, layers[name])))
        yield
    finally:
        for handle in handles:
            handle.remove()
