"""Gradient checkpointing: less memory for activations, and one more forward pass of the decoder in every step.

An adapter in fp32 is the same with and without it, bit for bit. Most versions of ACE-Step turn it on always or never;
here it is a choice, and with ``auto`` it is switched when the estimate says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import click

from ..errors import Refusal
from ..hookspecs import hookimpl
from ..run import Run
from .checkpointing import switch_checkpointing
from .estimate import shown
from .frozen_weights import kept_weights
from .of_training import Estimate, estimate

if TYPE_CHECKING:
    import torch

_SWITCHED: Final = "sidestep.checkpointing"


@hookimpl
def acestep_options() -> list[click.Option]:
    """The choice."""
    return [
        click.Option(
            ["--gradient-checkpointing"],
            type=click.Choice(["auto", "on", "off"]),
            default="auto",
            show_default=True,
            metavar="WHEN",
            help="Less memory, more time, same result: auto, on or off.",
        ),
    ]


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
    needed = estimate(run, decoder, kept_weights(run, decoder, network, autocast).keys(), autocast)
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
