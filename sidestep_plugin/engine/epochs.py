"""Where an epoch ends, and a training: plugins look at it, and what was stopped or failed is saved.

An epoch ends behind its last optimizer step and before anything is saved, in every version of upstream. Its loop goes
on behind the last batch of an epoch to an optimizer step for the rest of its gradients. The first thing that it
reports, logs as the epoch's loss, saves or reads after that comes later, so the end is there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..errors import Refusal, unusable_answer
from ..files import room
from ..run import Clip, EpochNews, Run
from ..text import counted
from .answers import checked_lines, described
from .checkout import place_of
from .loggers import log_entries
from .shapes import INTERRUPTED

if TYPE_CHECKING:
    from .current import Training
    from .host import Host

EPOCH_LOSS: Final = "train/epoch_loss"
"""What every known version of upstream with Lightning logs behind an epoch's last optimizer step."""


def began(host: Host, training: Training) -> None:
    """Before the first batch that this run computes. Raises Refusal."""
    run = training.run
    with _pause(host, run):
        host.ask_and_announce("engine_training_began", run=run)
        if not run.resuming and training.journal is not None and not training.journal.steps:
            _between(host, training, 0, None)


def ended(host: Host, training: Training) -> None:
    """Tell the plugins about an epoch whose last batch was computed, once. Raises Refusal."""
    journal = training.journal
    if journal is None or journal.epoch_to_end is None:
        return
    (epoch, loss), journal.epoch_to_end = journal.epoch_to_end, None
    run = training.run
    with host.refusing():
        for plugin, entries in host.registry.call("acestep_epoch_finished", run=run, epoch=epoch, loss=loss):
            _log(host, training, plugin, entries, epoch)
    with _pause(host, run):
        host.ask_and_announce("engine_epoch_ended", run=run, epoch=epoch, loss=loss)
        _between(host, training, epoch, loss)


@contextmanager
def _pause(host: Host, run: Run) -> Iterator[None]:
    """What this block takes is not the training's time, once that has begun."""
    since = time.monotonic()
    try:
        with host.refusing():
            yield
    finally:
        if run.steps > run.resumed_at:
            run.paused += time.monotonic() - since


def _between(host: Host, training: Training, epoch: int, loss: float | None) -> None:
    asked = {"run": training.run, "epoch": epoch, "loss": loss, "folder": training.run.engine.folder}
    for plugin, news in host.registry.call("acestep_between_epochs", **asked):
        _check_news(plugin, news)
        for line in checked_lines(plugin, "acestep_between_epochs", news.lines):
            host.announce(line)
        log_entries(host, training, news.logged, epoch)


def _log(host: Host, training: Training, plugin: str, entries: Any, epoch: int) -> None:
    """Write what a plugin returned for an epoch to upstream's log. Raises PluginError."""
    hook = "acestep_epoch_finished"
    if not isinstance(entries, Mapping):
        raise unusable_answer(plugin, hook, described(entries), "numbers and tensors by name")
    for name, value in entries.items():
        if (wrong := _not_loggable(name, value)) is not None:
            raise unusable_answer(plugin, hook, wrong, "numbers, or tensors of finite values, by name")
    log_entries(host, training, entries, epoch)


def _not_loggable(name: Any, value: Any) -> str | None:
    """What keeps an entry out of upstream's log; None for a number and a tensor that has a histogram."""
    import torch

    if not isinstance(name, str):
        return f"an entry named {name!r}"
    if isinstance(value, int | float):
        return None
    if not isinstance(value, torch.Tensor) or value.is_complex() or value.numel() == 0:
        return f"{name!r} as {described(value)}"
    if not bool(value.isfinite().all()):
        return f"{name!r} as {described(value)} with values that are not finite"
    return None


def _check_news(plugin: str, news: Any) -> None:
    """Raises PluginError for an answer that cannot be told."""
    hook = "acestep_between_epochs"
    if not isinstance(news, EpochNews):
        raise unusable_answer(plugin, hook, described(news), "an EpochNews")
    entries = news.logged.items() if isinstance(news.logged, Mapping) else [(None, news.logged)]
    for name, value in entries:
        if not isinstance(name, str) or not isinstance(value, int | float | Clip):
            raise unusable_answer(plugin, hook, f"{name!r} as {described(value)}", "numbers and clips by name")


# -- the end of a training -------------------------------------------------------------------------------------------


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
