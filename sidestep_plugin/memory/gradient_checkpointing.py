"""Gradient checkpointing: less memory for activations, and one more forward pass of the decoder in every step.

A layer keeps only its input for the backward pass and computes the rest again. An adapter in fp32 is the same with and
without it, bit for bit: the random state of the first pass is restored for the second, so dropout draws the same
numbers. Most versions of ACE-Step turn it on always or never; here it is a choice, and with ``auto`` it is switched
when the estimate says so.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import click

from ..errors import Refusal
from ..hookspecs import hookimpl
from ..options import option
from ..run import Run
from .base_weights import kept_weights
from .estimate import Saving, shown
from .of_training import Estimate, estimate

if TYPE_CHECKING:
    import torch

_SWITCHED: Final = "sidestep.checkpointing"


@hookimpl
def acestep_options() -> list[click.Option]:
    text = "Less memory, more time, same result: auto, on or off."
    return [option("--gradient-checkpointing", text, click.Choice(["auto", "on", "off"]), "WHEN", "auto")]


@hookimpl
def acestep_run_started(run: Run) -> None:
    """Refuse a choice that would have no effect, before anything is changed."""
    said = run.options["gradient_checkpointing"]
    if said != "auto" and (not run.with_lightning or run.tensor_dir is None):
        raise Refusal(
            f"--gradient-checkpointing {said} needs ACE-Step's trainer with Lightning. Install Lightning "
            "(pip install lightning), or leave the option out."
        )


@hookimpl
def engine_model_ready(run: Run, decoder: torch.nn.Module, network: Any, autocast: torch.dtype | None) -> list[str]:
    said, was_on = run.options["gradient_checkpointing"], _is_on(decoder)
    needed = estimate(run, decoder, kept_weights(run.options, decoder, network, autocast), autocast)
    if said == "auto":
        on, why = (was_on, "") if needed is None else _decided(needed, was_on)
    else:
        on, why = said == "on", "as you said"
    if on is not was_on:
        run.engine.at_end(switch_checkpointing(decoder, on))
        run.state[_SWITCHED] = f"Gradient checkpointing: {_word(on)}, {why} (ACE-Step: {_word(was_on)}"
    return [] if needed is None else needed.lines(checkpointing=on)


@hookimpl
def engine_types_final(run: Run) -> list[str]:
    import torch

    line = run.state.pop(_SWITCHED, None)
    if line is None:
        return []
    # Known only now. Versions that round the adapter to bf16 were seen to differ in the last bits.
    trained = [weight for weight in run.model.decoder.parameters() if weight.requires_grad]
    rounded = any(weight.dtype is not torch.float32 for weight in trained)
    return [
        f"{line}; {'the last bits may differ, as the adapter is not fp32' if rounded else 'same result, bit for bit'})"
    ]


def _decided(needed: Estimate, was_on: bool) -> tuple[bool, str]:
    """Whether to have it on, and why. Upstream's own choice stays unless the estimate is clearly against it."""
    if needed.free is None:
        return was_on, ""
    without = needed.needs(checkpointing=False)
    told = f"about {shown(without.total)} without it"
    if was_on and without.fits(needed.free):
        return False, f"because {told} fit into {shown(needed.free)}"
    if not was_on and without.total > needed.free:
        return True, f"because {told} do not fit into {shown(needed.free)}"
    return was_on, ""


def _word(on: bool) -> str:
    return "on" if on else "off"


def _is_on(decoder: torch.nn.Module) -> bool:
    # The decoder itself has the attribute, too; only the layers' counts.
    return any(getattr(module, "gradient_checkpointing", False) for name, module in decoder.named_modules() if name)


def is_checkpointed(decoder: torch.nn.Module) -> bool:
    """Whether gradient checkpointing is on for any layer of a decoder."""
    return any(layer.gradient_checkpointing for layer in _layers(decoder))


def switch_checkpointing(decoder: torch.nn.Module, on: bool) -> Callable[[], None]:
    """Switch gradient checkpointing on or off for every layer.

    Upstream turns on the kind that loses the gradients of a layer none of whose inputs has one, and marks the input of
    its training step for that. Versions that never turn it on do not mark it, so the other kind is used here.

    Returns:
        What puts it back as it was.

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


SAVING: Final = Saving(
    option="gradient_checkpointing",
    apply=lambda now: None if now.checkpointing else now.but(checkpointing=True),
    flag=lambda then: "--gradient-checkpointing on",
    cost="same adapter, bit for bit; steps take longer",
)
