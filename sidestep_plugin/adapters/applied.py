"""Applies a saved adapter to a loaded decoder while it is evaluated, without PEFT or LyCORIS.

Each adapted layer gets a forward hook that adds what the adapter adds. The base weights are not touched, so nothing is
rounded and several adapters can be applied to one model in turn. The operations and their order are those of PEFT's
``lora.Linear`` (``out + B(A(x)) * alpha / rank``) and of LyCORIS' ``LokrModule`` (``out + x ((W + dW) - W)^T`` with
``dW = kron(w1, w2) * alpha / rank``, whose strength is 1 when no factor is decomposed).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import Refusal
from ..text import shown
from .layers import Adapter, Layer

if TYPE_CHECKING:
    import torch

Shapes = Mapping[str, tuple[int, ...]]


def check_applicable(adapter: Adapter, shapes: Shapes, model: str) -> None:
    """Refuse an adapter that cannot be applied to a model's decoder.

    Args:
        adapter: the adapter.
        shapes: shapes of the decoder's weights by layer; {} if they are not known yet.
        model: the model's name.

    Raises:
        Refusal: another kind of adapter, an unknown strength, or layers of another width.
    """
    path = adapter.file.path
    if adapter.kind not in ("lora", "lokr") or adapter.is_dora:
        kind = "DoRA" if adapter.is_dora else adapter.kind
        raise Refusal(f"{path} is a {kind}. Expected a LoRA or LoKr without weight decomposition. Leave it out.")
    for name, layer in adapter.layers.items():
        if name in adapter.idle:
            continue
        if layer.rank is not None and layer.alpha is None:
            raise Refusal(
                f"The alpha of {path} is unknown, and so is its strength. Put its adapter_config.json beside it."
            )
        if "lokr_t2" in layer.parts:
            raise Refusal(f"{path} is a LoKr with a Tucker decomposition, which cannot be compared. Leave it out.")
        wanted, found = shapes.get(name), _shape(adapter, layer)
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


@contextmanager
def applied(adapter: Adapter, layers: Mapping[str, torch.nn.Module]) -> Iterator[None]:
    """Apply an adapter in this block | layers: the decoder's own layers by name."""
    from safetensors import safe_open

    handles = []
    try:
        with safe_open(adapter.file.path, framework="pt") as weights:
            for name, layer in adapter.layers.items():
                if name not in adapter.idle:
                    tensors = {part: weights.get_tensor(key) for part, key in layer.parts.items()}
                    hook = (_lora if adapter.kind == "lora" else _lokr)(layer, tensors, layers[name])
                    handles.append(layers[name].register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


Hook = Callable[[Any, tuple[Any, ...], Any], Any]


def _lora(layer: Layer, tensors: Mapping[str, torch.Tensor], module: Any) -> Hook:
    import torch.nn.functional as F

    assert layer.rank is not None and layer.alpha is not None
    device, strength = module.weight.device, layer.alpha / layer.rank
    down, up = (tensors[part].to(device).float() for part in ("A", "B"))

    def add(_: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        added = F.linear(F.linear(inputs[0].to(down.dtype), down), up) * strength
        return (output + added).to(output.dtype)

    return add


def _lokr(layer: Layer, tensors: Mapping[str, torch.Tensor], module: Any) -> Hook:
    import torch
    import torch.nn.functional as F

    def factor(name: str) -> torch.Tensor:
        whole = tensors.get(name)
        return (tensors[f"{name}_a"].float() @ tensors[f"{name}_b"].float()) if whole is None else whole.float()

    base = module.weight.detach().float()
    strength = 1.0 if layer.rank is None or layer.alpha is None else layer.alpha / layer.rank
    difference = torch.kron(factor("lokr_w1"), factor("lokr_w2")).to(base.device) * strength
    delta = (base + difference.reshape(base.shape)) - base

    def add(_: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        return (output + F.linear(inputs[0], delta.to(inputs[0].dtype))).to(output.dtype)

    return add


def _shape(adapter: Adapter, layer: Layer) -> tuple[int, int] | None:
    """Rows and columns of the weight that a layer was trained for; None when its tensors do not fit together."""

    def size(part: str) -> tuple[int, ...]:
        return adapter.file.tensors[layer.parts[part]].shape if part in layer.parts else ()

    if adapter.kind == "lora":
        down, up = size("A"), size("B")
        return (up[0], down[1]) if len(down) == len(up) == 2 and down[0] == up[1] else None
    factors = []
    for name in ("lokr_w1", "lokr_w2"):
        whole, left, right = size(name), size(f"{name}_a"), size(f"{name}_b")
        if not whole and len(left) == len(right) == 2 and left[1] == right[0]:
            whole = (left[0], right[1])
        if len(whole) != 2:
            return None
        factors.append(whole)
    return factors[0][0] * factors[1][0], factors[0][1] * factors[1][1]
