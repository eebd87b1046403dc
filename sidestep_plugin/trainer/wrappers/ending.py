"""The end of a training: a run that was stopped or failed is saved, and plugins summarize it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ...errors import Refusal
from ...resuming.checkpoints import read_checkpoint
from ...resuming.replay import put_parameters, trained_tensors
from ...resuming.weights import put_weights
from ...text import counted
from ..answers import checked_lines
from ..checkout import place_of
from ..failures import room
from ..seams import FINAL, SAVE_FUNCTIONS

if TYPE_CHECKING:
    from ...run import ResumePoint
    from ..current import Training
    from ..host import Host

INTERRUPTED: Final = "interrupted"
"""Folder in the output folder for the checkpoint of a training that was stopped or failed."""

BEST: Final = "checkpoints/best"
"""Folder in the output folder for the checkpoint with the lowest validation loss, as upstream calls it too."""


def saved_after(host: Host, training: Training, *, failed: bool = False) -> list[str]:
    """Save a run that ends early, so that it can be resumed | returns lines for the user."""
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
    return [f"💾 Saved as it was after {counted(journal.steps, 'training step')}: {host.interrupted}"]


def save_best(host: Host, training: Training) -> list[str]:
    """Save the adapter as ``checkpoints/best`` with upstream's own function | returns lines for the user.

    Raises Refusal for an adapter that must not be saved; a full disk is announced, and the training goes on.
    """
    journal = training.journal
    assert journal is not None
    folder = Path(training.run.training_config.output_dir) / BEST
    _save(host, training, folder, journal.here(training.run))
    journal.unsaved = False  # that is about the checkpoint that upstream saves next
    return []


def finished_early(host: Host, training: Training) -> list[str]:
    """Save the finished adapter of a training that validation has stopped | returns lines for the user.

    It is the best one, read back from its checkpoint, or else the newest one.
    """
    run, journal = training.run, training.journal
    assert journal is not None
    folder = place_of(host.trainer, str(run.training_config.output_dir))
    which = f"the newest adapter, of epoch {journal.epochs_begun}"
    steps = run.steps
    try:
        try:
            run.gather(None)  # the first process has saved it by then
            point = read_checkpoint(folder / BEST).point
            put_weights(run, point)
            put_parameters(trained_tensors(journal.scheduler), point)
            which = f"the best adapter, of epoch {point.epochs}"
            run.steps = point.steps_done or steps
        except Refusal as refusal:
            host.announce(f"Warning: the best adapter cannot be read, so final is the newest one. {refusal}")
        _save(host, training, Path(run.training_config.output_dir) / FINAL, None)
    except Exception as error:  # as in saved_after: the training is over in any case
        reason = str(error) if isinstance(error, Refusal) else f"{type(error).__name__}: {error}. {room(folder)}"
        return [f"❌ The finished adapter could not be saved: {reason}"]
    finally:
        run.steps = steps
    return [f"✅ Training complete: final is {which}. Saved to {folder / FINAL}"]


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
    """The plugins' summaries of a run that has ended, once | returns lines for the user."""
    run, journal = training.run, training.journal
    if journal is None or journal.summed_up or journal.computed == 0 or (ending != "finished" and journal.finished):
        return []
    journal.summed_up = True
    if run.ranks.several:
        if ending == "failed":  # the other processes are elsewhere
            return []
        for exchange in run.together:
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
