"""What plugins do between two epochs: when they are asked, and what becomes of their answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from ..errors import PluginError, Refusal
from ..run import Clip, EpochNews
from .answers import checked_lines, described
from .checkout import place_of
from .loggers import log_entries

if TYPE_CHECKING:
    from ..run import Run
    from .current import Training
    from .host import Host

EPOCH_LOSS: Final = "train/epoch_loss"
"""What every known version of upstream logs behind an epoch's last optimizer step, before it validates and saves."""


def between_epochs(host: Host, trainer: Any, run: Run, epoch: int, loss: float | None) -> None:
    """Ask the plugins, announce their lines and log their numbers and clips. Raises Refusal."""
    folder = place_of(host.trainer, str(run.training_config.output_dir))
    asked = {"run": run, "epoch": epoch, "loss": loss, "folder": folder}
    try:
        for plugin, news in host.registry.call("acestep_between_epochs", **asked):
            _check(plugin, news)
            for line in checked_lines(plugin, "acestep_between_epochs", news.lines):
                host.announce(line)
            log_entries(host, trainer, news.logged, epoch)
    except Refusal as refusal:  # upstream reports it as a failure
        host.refusal = refusal
        raise


def epoch_logged(host: Host, training: Training, name: str, value: Any, step: int | None) -> None:
    """Follow upstream's log: behind the loss of an epoch the plugins are asked. Raises Refusal."""
    journal = training.journal
    if name != EPOCH_LOSS or (journal is not None and journal.walking):
        return
    epoch = step if journal is None else journal.epochs_begun
    if epoch is not None:
        loss = training.run.loss_by_epoch.get(epoch, float(value))
        between_epochs(host, training.trainer, training.run, epoch, loss)


def _check(plugin: str, news: Any) -> None:
    """Raise PluginError for an answer that cannot be told."""
    if not isinstance(news, EpochNews):
        raise PluginError(
            f"Plugin {plugin!r} returned {described(news)} from acestep_between_epochs, expected an EpochNews."
        )
    entries = news.logged.items() if isinstance(news.logged, Mapping) else [(None, news.logged)]
    for name, value in entries:
        if not isinstance(name, str) or not isinstance(value, int | float | Clip):
            raise PluginError(
                f"Plugin {plugin!r} returned {name!r} as {described(value)} from acestep_between_epochs, expected "
                "numbers and clips by name."
            )
