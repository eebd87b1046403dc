"""Modules of the decoder that a plan replaces for one training: put in before its first step, taken out at its end."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from ...errors import PluginError
from ..answers import described
from ..current import Training, command_line

if TYPE_CHECKING:
    import torch

    from ...run import MemoryPlan


def replace_modules(plugin: str, training: Training, decoder: torch.nn.Module, plan: MemoryPlan) -> None:
    """Put a plan's replacements in place, one after the other, so that little more than one is there twice.

    The originals come back when the training ends, and wait for that in the computer's memory. After a training from
    the command line the program ends, so there they are freed at once.

    Raises:
        PluginError: a name that is no module of the decoder, or a replacement that is no module.
    """
    import torch

    for name, make in plan.replaced.items():
        owner, _, last = name.rpartition(".")
        try:
            original, parent = decoder.get_submodule(name), decoder.get_submodule(owner)
        except AttributeError:
            raise PluginError(
                f"Plugin {plugin!r} replaces {name!r} in acestep_plan_memory, which the decoder does not have. "
                "Use names from decoder.named_modules()."
            ) from None
        made: Any = make(original)
        if not isinstance(made, torch.nn.Module):
            raise PluginError(
                f"Plugin {plugin!r} made {described(made)} in place of {name!r} in acestep_plan_memory, expected a "
                "torch.nn.Module."
            )
        made.train(original.training)
        parent.add_module(last, made)
        if command_line.get() is None:
            device = next((weight.device for weight in original.parameters()), None)
            training.at_end.append(partial(_put_back, decoder, name, original, device))
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
