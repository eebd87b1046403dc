"""Gradient checkpointing of a decoder: whether it is on, and switching it for one training.

With it, a layer keeps only its input for the backward pass and computes the rest again. The adapter is the same, bit
for bit: the random state of the first pass is restored for the second, so dropout draws the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import Refusal

if TYPE_CHECKING:
    import torch


def is_checkpointed(decoder: torch.nn.Module) -> bool:
    """Whether gradient checkpointing is on for any layer of a decoder."""
    return any(layer.gradient_checkpointing for layer in _layers(decoder))


def switch_checkpointing(decoder: torch.nn.Module, on: bool) -> Callable[[], None]:
    """Switch gradient checkpointing on or off for every layer | returns what puts it back as it was.

    Upstream turns on the kind that loses the gradients of a layer none of whose inputs has one, and marks the input of
    its training step for that. Versions that never turn it on do not mark it, so the other kind is used here.

    Raises:
        Refusal: no layer of this model can be checkpointed.
    """
    from torch.utils.checkpoint import checkpoint

    layers = _layers(decoder)
    if on and not layers:
        raise Refusal(
            "The layers of this model's code have no gradient checkpointing. Leave --gradient-checkpointing on out."
        )
    before = [(layer, layer.gradient_checkpointing) for layer in layers]
    for layer, was_on in before:
        if on and not was_on:
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        layer.gradient_checkpointing = on

    def put_back() -> None:
        for layer, was_on in before:
            layer.gradient_checkpointing = was_on

    return put_back


def _layers(decoder: torch.nn.Module) -> list[Any]:
    """The layers of a decoder that are made for checkpointing; the model's code decides which."""
    try:
        from transformers.modeling_layers import GradientCheckpointingLayer
    except ImportError:  # transformers before 4.53, with which no model of ACE-Step loads
        return []
    return [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
