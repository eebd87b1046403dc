"""The end of a training: a run that was stopped or failed is saved, and plugins summarize it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import Refusal
from ..files import room
from ..text import counted
from .answers import checked_lines
from .checkout import place_of
from .shapes import INTERRUPTED

if TYPE_CHECKING:
    from .current import Training
    from .host import Host


def saved_after(host: Host, training: Training, *, failed: bool = False) -> list[str]:
    """Save a run that ends early, so that it can be resumed. Returns lines for the user."""
    run, journal = training.run, training.journal
    if journal is None or not host.resumes or journal.finished or journal.catching_up or not journal.computed:
        return []
    if failed and not journal.learned:  # the adapter is what it was at the start
        return []
    if failed and run.ranks.several:  # what the other processes would have to add cannot be asked for any more
        return []
    journal.failed = failed
    point = journal.here(run)
    folder = Path(run.training_config.output_dir) / INTERRUPTED
    journal.ending = True
    try:
        run.engine.save(INTERRUPTED, point)
    except Exception as error:  # most likely a full disk; the training is over in any case
        reason = str(error) if isinstance(error, Refusal) else f"{type(error).__name__}: {error}. {room(folder)}"
        return [f"⚠️ The training since the newest checkpoint could not be saved: {reason}"]
    host.interrupted = place_of(host.trainer, str(folder))
    return [f"💾 Saved as it was after {counted(journal.steps, 'training step')}: {host.interrupted}"]


def summed_up(host: Host, training: Training, ending: str) -> list[str]:
    """The plugins' summaries of a run that has ended, once. Returns lines for the user.

    A resumed training of which nothing was left to compute is summed up too: it may have been stopped before that.
    """
    run, journal = training.run, training.journal
    if journal is None or journal.summed_up or (ending != "finished" and journal.finished):
        return []
    if journal.computed == 0 and (ending != "finished" or not journal.steps):
        return []
    journal.summed_up = journal.ending = True
    if run.ranks.several:
        if ending == "failed":  # the other processes are elsewhere
            return []
        for exchange in run.before_run_ended:
            exchange()
        if not run.ranks.first:
            return []
    told: list[str] = []
    try:
        asked = {"run": run, "ending": ending, "folder": run.engine.folder}
        for plugin, lines in host.registry.call("acestep_run_ended", **asked):
            told += checked_lines(plugin, "acestep_run_ended", lines)
    except Refusal as refusal:  # the adapter is saved or about to be, and matters more than a summary
        told.append(f"⚠️ {refusal}")
    return told
