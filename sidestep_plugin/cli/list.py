"""``acestep-train list``: the checkpoints of a training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sidestep_plugin.errors import Refusal
from sidestep_plugin.options import Place

from .commands import Command, Unusable, echo_json
from .terminal import echo

if TYPE_CHECKING:
    from sidestep_plugin.resuming.overview import Saved


@click.command("list", cls=Command)
@click.argument("output", type=Place(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def list_checkpoints(output: Path, as_json: bool) -> None:
    """List the checkpoints of a training: epoch, steps, mean loss of the epoch, and size.

    OUTPUT is the --output-dir of a training. It may still be running.

    \b
    Example:
        acestep-train list adapters/jazz
    """
    from sidestep_plugin.resuming.overview import saved_in

    try:
        entries = saved_in(output.absolute())
    except Refusal as refusal:
        raise Unusable(str(refusal)) from None
    if as_json:
        echo_json([dataclasses.asdict(entry) for entry in entries])
        return
    for line in [*_table(entries), "", *_remarks(entries, output.absolute())]:
        echo(line)


def _table(entries: Sequence[Saved]) -> Sequence[str]:
    rows = [("", "epoch", "steps", "loss", "MB", "")]
    for entry in entries:
        change = entry.validation_change
        told = ["" if change is None else f"validation {100 * change:+.2f} %"]
        if entry.average is not None:
            change = entry.average_change
            told.append("average" if change is None else f"average {100 * change:+.2f} %")
        notes = ", ".join(filter(None, [*told, "" if entry.resumable else "cannot be resumed from"]))
        rows.append(
            (
                entry.name,
                _cell(entry.epoch),
                _cell(entry.training_steps),
                "-" if entry.loss is None else f"{entry.loss:.4f}",
                f"{entry.bytes / 2**20:.1f}",
                notes,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = []
    for name, *numbers, note in rows:
        right = [f"{number:>{width}}" for number, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([f"{name:<{widths[0]}}", *right, note]).rstrip())
    return lines


def _remarks(entries: Sequence[Saved], output: Path) -> Sequence[str]:
    """What the columns mean, and which adapter to take."""
    from sidestep_plugin.adapters.facts import better_than_final

    lines = ["loss: mean over the training steps of that epoch. The loss in a folder's name is ACE-Step's own count."]
    if any(entry.validation_change is not None for entry in entries):
        lines.append("validation: loss on the held-out songs, relative to the model without adapter; lower is better.")
    if better := better_than_final(output):
        lines.append(f"Note: {better}")
    return lines


def _cell(number: int | None) -> str:
    return "-" if number is None else str(number)


list = list_checkpoints  # the group looks the command up under its own name
