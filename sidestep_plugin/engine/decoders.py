"""A decoder in the middle of a training: reached below its wrappers, looked at undisturbed, without its adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final

from ..adapters.kinds import network_of
from .random_states import random_states, set_random_states

if TYPE_CHECKING:
    import torch

_OF_LYCORIS: Final = ("forward", "_lycoris_wrappers", "_lycoris_original_forward")
"""Attributes of a layer in which LyCORIS keeps what stands in place of its forward."""


def plain_decoder(model: Any) -> Any:
    """A model's decoder without the wrappers of a training: Lightning Fabric's and those of several GPUs.

    A LoRA's stays PEFT's model, a LoKr's layers stay wrapped by LyCORIS.
    """
    import torch

    decoder = model.decoder
    decoder = getattr(decoder, "_forward_module", decoder)
    return decoder.module if isinstance(decoder, torch.nn.parallel.DistributedDataParallel) else decoder


@contextmanager
def undisturbed(root: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """A block without gradients and dropout in which nothing is compiled. Afterwards everything is as it was.

    Random states, the mode (train or eval) of every module and what is trained are restored. Compiled modules compute
    uncompiled in the block: what the compiler sees there, such as other lengths or eval mode, decides what it compiles
    for the training afterwards, and with that how the training rounds.
    """
    import torch

    states = random_states(device)
    modes = [(module, module.training) for module in root.modules()]
    flags = [(weight, weight.requires_grad) for weight in root.parameters()]
    compiled = [(module, call) for module, _ in modes if (call := getattr(module, "_compiled_call_impl", None))]
    try:
        root.eval()
        for module, _ in compiled:
            module._compiled_call_impl = None
        with torch.no_grad():
            yield
    finally:
        for module, call in compiled:
            module._compiled_call_impl = call
        for module, mode in modes:
            module.training = mode
        for weight, flag in flags:
            weight.requires_grad_(flag)
        set_random_states(states, device)


@contextmanager
def without_ddp(decoder: Any) -> Iterator[None]:
    """Call the decoder itself where DistributedDataParallel wraps it, whose forward waits for the other processes."""
    import torch

    inner = getattr(decoder, "_forward_module", None)  # of Lightning's wrapper, which also decides about precision
    if not isinstance(inner, torch.nn.parallel.DistributedDataParallel):
        yield
        return
    decoder._forward_module = inner.module
    try:
        yield
    finally:
        decoder._forward_module = inner


@contextmanager
def without_adapter(module: Any) -> Iterator[None]:
    """The model without its adapter in this block: PEFT's layers are disabled, LyCORIS' taken out of the forward pass.

    A layer that is out of it already, because it adds nothing, stays out. Afterwards each layer has the very objects
    that it had: compiled code is kept for them.
    """
    decoder = module.model.decoder
    with ExitStack() as after:
        flags = [(weight, weight.requires_grad) for weight in decoder.parameters()]
        after.callback(lambda: [weight.requires_grad_(flag) for weight, flag in flags])
        for layer in decoder.modules():
            if callable(getattr(layer, "enable_adapters", None)) and not getattr(layer, "disable_adapters", False):
                layer.enable_adapters(False)
                after.callback(layer.enable_adapters, True)
        applied = [lora for lora in getattr(network_of(module), "loras", ()) if _is_applied(lora)]
        for lora in reversed(applied):
            layer = lora.org_module[0]
            after.callback(_put_back, layer, {name: vars(layer)[name] for name in _OF_LYCORIS if name in vars(layer)})
            lora.restore()
        yield


def _is_applied(lora: Any) -> bool:
    """Whether a LyCORIS module takes part in the forward pass: idle ones may have been taken out of it."""
    layer = lora.org_module[0]
    return layer.forward == lora.forward or lora in getattr(layer, "_lycoris_wrappers", ())


def _put_back(layer: torch.nn.Module, before: dict[str, Any]) -> None:
    for name in _OF_LYCORIS:
        vars(layer).pop(name, None)
    vars(layer).update(before)
