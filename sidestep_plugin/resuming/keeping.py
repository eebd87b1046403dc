"""Removes old checkpoints (``--keep-last N``): only those that ACE-Step saves every few epochs, no other adapter."""

from __future__ import annotations

import os
import re
import shutil
from typing import Final

import click

from ..hookspecs import hookimpl
from ..options import WholeNumber, option
from ..run import Run, SavedAdapter, Step
from .checkpoints import checkpoints_in, saved_before

_KEY: Final = "keeping"
_EPOCH: Final = re.compile(r"epoch_\d+(_loss_.*)?")
"""Names of the checkpoints that ACE-Step saves; ``best`` and whatever else lies beside them has another name."""


@hookimpl
def acestep_options() -> list[click.Option]:
    text = "Keep only the newest N checkpoints; best and final always stay.  [default: all]"
    return [option("--keep-last", text, WholeNumber(1, 10**6), "N")]


@hookimpl
def acestep_run_started(run: Run) -> list[str] | None:
    if (most := run.options["keep_last"]) is None:
        return None
    return [f"Checkpoints: the newest {'one is' if most == 1 else f'{most} are'} kept; best and final stay"]


@hookimpl
def acestep_adapter_saved(run: Run, saved: SavedAdapter) -> None:
    """Note that there is something to tidy: the new checkpoint is in its place only after this."""
    if run.options["keep_last"] is not None and saved.resume_point is not None:
        run.state[_KEY] = True


@hookimpl
def acestep_step_finished(step: Step) -> None:
    if step.run.state.pop(_KEY, False):
        _tidy(step.run)


@hookimpl
def acestep_run_ended(run: Run) -> None:
    if run.state.pop(_KEY, False):
        _tidy(run)


def _tidy(run: Run) -> None:
    """Remove the oldest checkpoints. One that cannot be removed stays, and the training goes on."""
    own = run.engine.folder / "checkpoints"
    folders = [
        folder
        for folder in checkpoints_in(run.engine.folder)
        if folder.parent == own and _EPOCH.fullmatch(folder.name) is not None
    ]
    oldest_first = sorted(folders, key=saved_before)
    for folder in oldest_first[: -int(run.options["keep_last"])]:
        gone = folder.with_name(f".{folder.name}.{os.urandom(4).hex()}.saving")  # whoever is killed here leaves that
        try:
            folder.rename(gone)
        except OSError as error:
            run.engine.announce(f"Warning: {folder} could not be removed (--keep-last): {error.strerror or error}.")
            continue
        shutil.rmtree(gone, ignore_errors=True)
