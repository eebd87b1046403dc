"""Gradient checkpointing: less memory for activations, and one more forward pass of the decoder in every step.

The adapter is the same with and without it, bit for bit. Most versions of ACE-Step turn it on always or never; here it
is a choice, and with ``auto`` it is switched when the estimate says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from sidestep_plugin import Refusal, hookimpl
from sidestep_plugin.run import MemoryPlan, Run

if TYPE_CHECKING:
    import torch


def options() -> list[click.Option]:
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


@hookimpl(specname="acestep_run_started")
def check_gradient_checkpointing(run: Run) -> None:
    """Refuse a choice that would have no effect, before anything is loaded or changed."""
    said = run.options["gradient_checkpointing"]
    if said != "auto" and not run.plans_memory:
        raise Refusal(
            f"--gradient-checkpointing {said} needs Lightning, and this training runs without it. Install it "
            "(pip install lightning), or leave the option out."
        )


@hookimpl(specname="acestep_plan_memory")
def plan_checkpointing(
    run: Run, decoder: torch.nn.Module, network: Any, autocast: torch.dtype | None
) -> MemoryPlan | None:
    said = run.options["gradient_checkpointing"]
    if said == "auto":
        return None
    on, is_on = said == "on", _is_on(decoder)
    told = "" if on is is_on else f" (ACE-Step had it {'on' if is_on else 'off'}; same result, bit for bit)"
    return MemoryPlan(checkpointing=on, lines=(f"Gradient checkpointing: {said}{told}",))


def _is_on(decoder: torch.nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) is True for module in decoder.modules())
