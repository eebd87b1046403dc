"""The end of a training: a run that was stopped or failed is saved, and plugins summarize it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ..errors import Refusal
from ..files import room
from .answers import checked_lines
from .checkout import place_of
from .shapes import SAVE_FUNCTIONS

if TYPE_CHECKING:
    from ..run import ResumePoint
    from .current import Training
    from .host import Host

INTERRUPTED: Final = "interrupted"
"""Folder in the output folder for the checkpoint of a training that was stopped or failed."""


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
        _save(host, training, folder, point)
    except Exception as error:  # most likely a full disk; the training is over in any case
        reason = str(error) if isinstance(error, Refusal) else f"{type(error).__name__}: {error}. {room(folder)}"
        return [f"⚠️ The training since the newest checkpoint could not be saved: {reason}"]
    host.interrupted = place_of(host.trainer, str(folder))
    return [f"💾 Saved as it was after {journal.steps} training steps: {host.interrupted}"]


def save_checkpoint(host: Host, training: Training, name: str) -> bool:
    """Save a checkpoint in a folder of the output folder, with upstream's own function.

    Returns:
        Whether it was saved: a full disk is announced, and the training goes on.

    Raises:
        Refusal: the adapter must not be saved.
    """
    journal = training.journal
    assert journal is not None
    before = journal.unsaved  # that is about the checkpoint that upstream saves
    journal.unsaved = False
    _save(host, training, Path(training.run.training_config.output_dir) / name, journal.here(training.run))
    saved, journal.unsaved = not journal.unsaved, before
    return saved


def save_weights(host: Host, training: Training, name: str) -> None:
    """Save the adapter alone in a folder of the output folder."""
    _save(host, training, Path(training.run.training_config.output_dir) / name, None)


def _save(host: Host, training: Training, folder: Path, point: ResumePoint | None) -> None:
    """Call upstream's save function: for a checkpoint with a point, else for the weights alone."""
    trainer, journal = training.trainer, training.journal
    assert journal is not None
    module, (save, checkpoint) = trainer.module, SAVE_FUNCTIONS[training.run.adapter_type]
    config = getattr(module, "lokr_config", None)
    known = {
        "model": module.model,
        "lycoris_net": getattr(module, "lycoris_net", None),
        "epoch": 0 if point is None else point.epochs,
        "global_step": 0 if point is None else int(journal.scheduler.last_epoch),
        "output_dir": str(folder),
        "lokr_config": config,
        "run_metadata": getattr(trainer, "run_metadata", None),
        "metadata": {"lokr_config": config.to_dict()} if config is not None else None,
    }
    if point is not None:
        known |= {"optimizer": journal.scheduler.optimizer, "scheduler": journal.scheduler}
    function = getattr(host.trainer, checkpoint, None) if point is not None else None
    function = function or getattr(host.trainer, save)
    function(**{name: known[name] for name in inspect.signature(function).parameters if name in known})


def summed_up(host: Host, training: Training, ending: str) -> list[str]:
    """The plugins' summaries of a run that has ended, once. Returns lines for the user."""
    run, journal = training.run, training.journal
    if journal is None or journal.summed_up or journal.computed == 0 or (ending != "finished" and journal.finished):
        return []
    journal.summed_up = True
    if run.ranks.several:
        if ending == "failed":  # the other processes are elsewhere
            return []
        for exchange in run.before_run_ended:
            exchange()
        if not run.ranks.first:
            return []
    folder = place_of(host.trainer, run.training_config.output_dir)
    told: list[str] = []
    try:
        for plugin, lines in host.registry.call("acestep_run_ended", run=run, ending=ending, folder=folder):
            told += checked_lines(plugin, "acestep_run_ended", lines)
    except Refusal as refusal:  # the adapter is saved or about to be, and matters more than a summary
        told.append(f"⚠️ {refusal}")
    return told
