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


def check_applicable(adapter: Adapter, shapes: Shapes, model: str, *, decomposed: bool = False) -> None:
    """Refuse an adapter that cannot be applied to a model's decoder.

    Args:
        adapter: the adapter.
        shapes: shapes of the decoder's weights by layer; {} if they are not known yet.
        model: the model's name.
        decomposed: whether weight decomposition (DoRA) is accepted.

    Raises:
        Refusal: another kind of adapter, an unknown strength, or layers of another width.
    """
    path = adapter.file.path
    if adapter.kind not in ("lora", "lokr") or (adapter.is_dora and not decomposed):
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


def linear_layers(decoder: torch.nn.Module) -> dict[str, Any]:
    """The decoder's linear layers by name, before anything wraps them."""
    import torch

    return {name: layer for name, layer in decoder.named_modules() if isinstance(layer, torch.nn.Linear)}


@contextmanager
def applied(adapter: Adapter, layers: Mapping[str, torch.nn.Module]) -> Iterator[None]:
    """Apply an adapter in this block.

    Args:
        adapter: what :func:`check_applicable` has accepted.
        layers: the decoder's own layers by name.
    """
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
    if "magnitude" in tensors:
        base = module.weight.detach().float()
        return _added(_scaled(base + up @ down * strength, tensors["magnitude"]) - base)

    def add(_: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        added = F.linear(F.linear(inputs[0].to(down.dtype), down), up) * strength
        return (output + added).to(output.dtype)

    return add


def _lokr(layer: Layer, tensors: Mapping[str, torch.Tensor], module: Any) -> Hook:
    import torch

    def factor(name: str) -> torch.Tensor:
        whole = tensors.get(name)
        return (tensors[f"{name}_a"].float() @ tensors[f"{name}_b"].float()) if whole is None else whole.float()

    base = module.weight.detach().float()
    strength = 1.0 if layer.rank is None or layer.alpha is None else layer.alpha / layer.rank
    difference = torch.kron(factor("lokr_w1"), factor("lokr_w2")).to(base.device) * strength
    merged = base + difference.reshape(base.shape)
    return _added((_scaled(merged, tensors["magnitude"]) if "magnitude" in tensors else merged) - base)


def _added(delta: torch.Tensor) -> Hook:
    """Add what a difference to a layer's weight, shape [out,in], adds to its output."""
    import torch.nn.functional as F

    def add(_: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        return (output + F.linear(inputs[0], delta.to(inputs[0].dtype))).to(output.dtype)

    return add


def _scaled(weight: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """A weight [out,in] whose rows have the norms of a magnitude [out] or [out,1]; its columns for one of [1,in]."""
    wanted = magnitude.to(weight.device).float()
    if wanted.dim() == 1:
        wanted = wanted.unsqueeze(1)
    of_rows = wanted.shape[0] == weight.shape[0]
    norm = weight.norm(dim=1 if of_rows else 0, keepdim=True)
    scaled: torch.Tensor = weight * (wanted / norm.clamp(min=1e-12))
    return scaled


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
