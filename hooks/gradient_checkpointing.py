"""Gradient checkpointing: less memory for activations, and one more forward pass of the decoder in every step.

An adapter in fp32 is the same with and without it, bit for bit. Most versions of ACE-Step turn it on always or never;
here it is a choice, and with ``auto`` it is switched when the estimate says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from sidestep_plugin import Refusal, hookimpl
from sidestep_plugin.memory.estimate import shown
from sidestep_plugin.run import MemoryPlan, Run

from .memory import kept_weights
from .memory_estimate import Estimate, estimate

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
    """Refuse a choice that would have no effect, before anything is changed."""
    said = run.options["gradient_checkpointing"]
    if said != "auto" and (not run.with_lightning or run.tensor_dir is None):
        raise Refusal(
            f"--gradient-checkpointing {said} needs ACE-Step's trainer with Lightning. Install Lightning "
            "(pip install lightning), or leave the option out."
        )


@hookimpl(specname="acestep_plan_memory")
def plan_checkpointing(
    run: Run, decoder: torch.nn.Module, network: Any, autocast: torch.dtype | None
) -> MemoryPlan | None:
    import torch

    said, was_on = run.options["gradient_checkpointing"], _is_on(decoder)
    needed = estimate(run, decoder, kept_weights(run, decoder, network, autocast).keys(), autocast)
    if said == "auto":
        on, why = (was_on, "") if needed is None else _decided(needed, was_on)
    else:
        on, why = said == "on", "as you said"
    lines = () if needed is None else tuple(needed.lines(checkpointing=on))
    if on is was_on:
        return MemoryPlan(lines=lines)

    def outcome(_: int | None) -> list[str]:
        # Known only now. Versions that round the adapter to bf16 were seen to differ in the last bits.
        rounded = any(weight.requires_grad and weight.dtype is not torch.float32 for weight in decoder.parameters())
        same = "the last bits may differ, as the adapter is not fp32" if rounded else "same result, bit for bit"
        return [f"Gradient checkpointing: {_word(on)}, {why} (ACE-Step: {_word(was_on)}; {same})"]

    return MemoryPlan(checkpointing=on, lines=lines, outcome=outcome)


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
