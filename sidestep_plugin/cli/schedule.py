"""``acestep-train schedule``: the timesteps of a generation."""

from __future__ import annotations

import click

from sidestep_plugin.options import FiniteFloat, WholeNumber
from sidestep_plugin.text import counted

from .commands import Command, echo_json


@click.command(cls=Command)
@click.option(
    "--shift",
    type=FiniteFloat(0.0, min_open=True),
    metavar="X",
    default=3.0,
    show_default=True,
    help="Above 1, more of the steps are at high noise.",
)
@click.option(
    "--steps", type=WholeNumber(1, 10_000), metavar="N", default=8, show_default=True, help="Number of steps."
)
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def schedule(shift: float, steps: int, as_json: bool) -> None:
    """Print the timesteps of a generation: t' = s*t / (1 + (s-1)*t) over t = 1, (n-1)/n, ..., 1/n.

    They are for generating. Training does not depend on shift; see acestep-train timesteps.

    \b
    Examples:
        acestep-train schedule --shift 3 --steps 8      turbo
        acestep-train schedule --shift 1 --steps 50     base and sft
    """
    from sidestep_plugin.timesteps.schedule import inference_timesteps

    values = inference_timesteps(shift, steps)
    if as_json:
        echo_json({"shift": shift, "steps": steps, "timesteps": list(values)})
        return
    click.echo(f"Shift {shift:g}, {counted(steps, 'step')}, from pure noise to the last step:")
    shown = [f"{t:.4g}" for t in values]
    for start in range(0, len(shown), 10):
        click.echo("  " + "  ".join(f"{text:<6}" for text in shown[start : start + 10]).rstrip())
