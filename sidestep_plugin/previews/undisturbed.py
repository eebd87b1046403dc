"""Lets a model generate in the middle of a training, and leaves everything as it was."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from ..engine.random_states import random_states, set_random_states

if TYPE_CHECKING:
    import torch


def plain_decoder(model: Any) -> Any:
    """The decoder without the wrappers of a training: those of Lightning and of several GPUs."""
    decoder = model.decoder
    decoder = getattr(decoder, "_forward_module", decoder)
    return decoder.module if type(decoder).__name__ == "DistributedDataParallel" else decoder


@contextmanager
def undisturbed(decoder: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """A block in which the decoder is in eval mode. Afterwards random states, modes and switches are as before.

    Gradients and weights are not touched: nothing in the block may train.
    """
    states = random_states(device)
    modes = [(module, module.training) for module in decoder.modules()]
    trained = [(weight, weight.requires_grad) for weight in decoder.parameters()]
    decoder.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for weight, flag in trained:
            weight.requires_grad_(flag)
        set_random_states(states, device)


@contextmanager
def adapter_off(decoder: Any, network: Any) -> Iterator[None]:
    """A block in which the decoder is the base model's | network: the LyCORIS network of a LoKr, None for a LoRA."""
    with ExitStack() as stack:
        if hasattr(decoder, "disable_adapter"):
            stack.enter_context(decoder.disable_adapter())
        for lora in reversed([lora for lora in getattr(network, "loras", ()) if _applied(lora)]):
            lora.restore()
            stack.callback(lora.apply_to)
        yield


def _applied(lora: Any) -> bool:
    """Whether a LyCORIS module takes part in the forward pass: idle ones may have been taken out of it."""
    layer = lora.org_module[0]
    return layer.forward == lora.forward or lora in getattr(layer, "_lycoris_wrappers", ())


def freed(device: torch.device) -> None:
    """Give back memory that nothing uses any more."""
    import torch

    gc.collect()
    if device.type in ("cuda", "xpu", "mps"):
        getattr(torch, device.type).empty_cache()
