"""The end of a training: a run that was stopped or failed is saved, and plugins summarize it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..adapters.kinds import network_of
from ..errors import Refusal
from ..files import room
from ..text import counted
from .answers import checked_lines
from .checkout import place_of
from .replay import put_parameters, trained_tensors
from .shapes import SAVE_FUNCTIONS, WEIGHT_FILES
from .weights import live_weights, put_weights

if TYPE_CHECKING:
    import torch

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
    return [f"💾 Saved as it was after {counted(journal.steps, 'training step')}: {host.interrupted}"]


def save_checkpoint(host: Host, training: Training, name: str, kept: ResumePoint | None = None) -> bool:
    """Save a checkpoint in a folder of the output folder, with upstream's own function.

    Args:
        kept: what :func:`in_ram` returned at an earlier place of the training; None for the training as it is.

    Returns:
        Whether it was saved: a full disk is announced, and the training goes on. In other processes than the first,
        which saves nothing, True.

    Raises:
        Refusal: the adapter must not be saved.
    """
    journal = training.journal
    assert journal is not None
    folder = Path(training.run.training_config.output_dir) / name
    before = journal.unsaved  # that is about the checkpoint that upstream saves
    journal.unsaved = False
    if kept is None:
        _save(host, training, folder, journal.here(training.run))
    else:
        with _in_the_adapter(training, kept):
            _save(host, training, folder, kept)
    saved, journal.unsaved = not journal.unsaved, before
    return saved


def in_ram(training: Training) -> ResumePoint:
    """The training as it is, weights included, with copies on the CPU. In every process."""
    run, journal = training.run, training.journal
    assert journal is not None
    point = journal.here(run)
    assert point is not None
    fields = {field.name: _copied(getattr(point, field.name)) for field in dataclasses.fields(point)}
    kept = {name: tell() for name, tell in run.keeps.items()}
    return dataclasses.replace(point, **fields | {"weights": _copied(live_weights(run)), "kept": kept})


def put(training: Training, point: ResumePoint, folder: Path | None = None) -> None:
    """Put the weights of a checkpoint into the adapter; its folder if it has one. Raises Refusal if they do not fit."""
    run, journal = training.run, training.journal
    assert journal is not None
    if journal.catching_up:  # what comes then would replace them
        journal.catch_up(run)
    put_weights(run, point.weights)
    put_parameters(trained_tensors(journal.scheduler), point)
    journal.holds = point
    places = [] if folder is None else [folder / name for name in WEIGHT_FILES[run.adapter_type]]
    journal.copy_of = next((place.parent for place in places if place.is_file()), None)


@contextmanager
def _in_the_adapter(training: Training, point: ResumePoint) -> Iterator[None]:
    """The adapter as it was at another place of the training; afterwards it is what it is now, bit for bit."""
    run, journal = training.run, training.journal
    assert journal is not None
    trained = [weight.detach() for weight in trained_tensors(journal.scheduler)]
    now = _copied(trained)
    before = dataclasses.replace(point, weights=_copied(live_weights(run)), parameters=now)
    steps, holds, copy_of = run.steps, journal.holds, journal.copy_of
    try:
        put(training, point)
        run.steps = point.steps_done or steps
        yield
    finally:
        put(training, before)
        run.steps, journal.holds, journal.copy_of = steps, holds, copy_of


@contextmanager
def in_its_place(training: Training, name: str, tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Other tensors in place of those that are trained; afterwards these are what they were, bit for bit.

    Args:
        name: which of the run's variants they are.
        tensors: one for each trained tensor, of its shape and any dtype.
    """
    import torch

    journal = training.journal
    assert journal is not None
    trained = trained_tensors(journal.scheduler)
    with torch.no_grad():
        now = [weight.detach().clone() for weight in trained]
        try:
            training.variant = name
            for weight, value in zip(trained, tensors, strict=True):
                weight.copy_(value)
            yield
        finally:
            training.variant = ""
            for weight, value in zip(trained, now, strict=True):
                weight.copy_(value)


def _copied(value: Any) -> Any:
    """A value whose tensors are copies on the CPU."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_copied, value))
    return value


class _State:
    """Stands for an optimizer or a scheduler whose state is known, where it is saved."""

    def __init__(self, state: Mapping[str, Any] | None) -> None:
        self._state = dict(state or {})

    def state_dict(self) -> dict[str, Any]:
        return self._state


def save_weights(host: Host, training: Training, name: str) -> None:
    """Save the adapter alone in a folder of the output folder."""
    _save(host, training, Path(training.run.training_config.output_dir) / name, None)


def _save(host: Host, training: Training, folder: Path, point: ResumePoint | None) -> None:
    """Call upstream's save function: for a checkpoint with a point, else for the weights alone."""
    trainer, journal = training.trainer, training.journal
    assert journal is not None
    module, (save, checkpoint) = trainer.module, SAVE_FUNCTIONS[training.run.adapter_type]
    config = getattr(module, "lokr_config", None)
    optimizer, scheduler = journal.scheduler.optimizer, journal.scheduler
    if journal.holds is not None and point is not None:
        optimizer, scheduler = _State(point.optimizer), _State(point.scheduler)
    known = {
        "model": module.model,
        "lycoris_net": network_of(module),
        "epoch": 0 if point is None else point.epochs,
        "global_step": 0 if point is None else int(scheduler.state_dict()["last_epoch"]),
        "output_dir": str(folder),
        "lokr_config": config,
        "run_metadata": getattr(trainer, "run_metadata", None),
        "metadata": {"lokr_config": config.to_dict()} if config is not None else None,
    }
    if point is not None:
        known |= {"optimizer": optimizer, "scheduler": scheduler}
    function = getattr(host.trainer, checkpoint, None) if point is not None else None
    function = function or getattr(host.trainer, save)
    function(**{name: known[name] for name in inspect.signature(function).parameters if name in known})


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
    folder = place_of(host.trainer, run.training_config.output_dir)
    told: list[str] = []
    try:
        for plugin, lines in host.registry.call("acestep_run_ended", run=run, ending=ending, folder=folder):
            told += checked_lines(plugin, "acestep_run_ended", lines)
    except Refusal as refusal:  # the adapter is saved or about to be, and matters more than a summary
        told.append(f"⚠️ {refusal}")
    return told
