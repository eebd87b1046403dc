"""Modules of the decoder that are replaced for one training: put in before its first step, taken out at its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ..run import Run


def replace_modules(
    run: Run, decoder: torch.nn.Module, replaced: Mapping[str, Callable[[Any], torch.nn.Module]]
) -> None:
    """Put replacements in place, one after the other, so that little more than one layer is there twice.

    The originals come back when the training ends, and wait for that in the computer's memory. After a training from
    the command line the program ends, so there they are freed at once.

    Args:
        run: the training.
        decoder: its decoder.
        replaced: by name of a module, a function that is given the module and returns another one, which computes the
            same shapes and has nothing to train.
    """
    for name, make in replaced.items():
        owner, _, last = name.rpartition(".")
        original = decoder.get_submodule(name)
        made = make(original)
        made.train(original.training)
        decoder.get_submodule(owner).add_module(last, made)
        if not run.engine.ends_the_program:
            device = next((weight.device for weight in original.parameters()), None)
            run.engine.at_end(partial(_put_back, decoder, name, original, device))
            original.to("cpu")


def _put_back(decoder: torch.nn.Module, name: str, original: torch.nn.Module, device: torch.device | None) -> None:
    owner, _, last = name.rpartition(".")
    frozen = [weight for weight in decoder.parameters() if weight.is_floating_point() and not weight.requires_grad]
    # Early versions of upstream cast the whole model to bf16, which the original has missed.
    smallest = min((weight.dtype for weight in frozen), key=lambda dtype: dtype.itemsize, default=None)
    for weight in original.parameters():
        if smallest is not None and weight.dtype.itemsize > smallest.itemsize:
            original.to(smallest)
            break
    decoder.get_submodule(owner).add_module(last, original if device is None else original.to(device))
