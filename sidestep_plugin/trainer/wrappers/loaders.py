"""The data loaders: the journal counts their epochs, and a resumed run goes through recorded ones without reading."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial, wraps
from itertools import product
from typing import TYPE_CHECKING, Any

from ...errors import PluginError
from ...signals import ignored_in_worker
from ..answers import described
from ..between_epochs import between_epochs
from ..current import running_training
from ..devices import share_of_songs

if TYPE_CHECKING:
    from ...run import Run
    from ..host import Host


def wrap_loader(passes: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """Route every pass of a loader that upstream makes through `passes`, a method of the journal."""

    @wraps(original)
    def loader(*args: Any, **kwargs: Any) -> Any:
        made, training = original(*args, **kwargs), running_training.get()
        if made is None or training is None or training.journal is None:
            return made
        return _watched(made, partial(passes, training.journal, training.run))

    return loader


def wrap_training_loader(host: Host, passes: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """The same for the training loader, which also gets its share of the songs if there are several processes."""

    @wraps(original)
    def loader(*args: Any, **kwargs: Any) -> Any:
        made, training = original(*args, **kwargs), running_training.get()
        if made is None or training is None or training.journal is None:
            return made
        through = partial(passes, training.journal, training.run)
        if not training.run.ranks.several:
            return _watched(made, through)
        songs, journal = len(made.dataset), training.journal
        made, set_epoch = share_of_songs(made, training.run)
        if training.plan.outcome is not None:
            for line in training.plan.outcome(training.run, songs, len(made)):
                host.announce(line)

        def in_order(batches: Callable[[], Iterator[Any]], length: int) -> Any:
            set_epoch(journal.epochs_begun)  # some versions do not leave the loader to Fabric, which would do it
            return through(batches, length)

        return _watched(made, in_order)

    return loader


def epoch_finished(host: Host, trainer: Any, run: Run, epoch: int, loss: float) -> None:
    """Write what plugins return for an epoch to upstream's log. Raises Refusal."""
    loggers = getattr(getattr(trainer, "fabric", None), "loggers", ()) if run.ranks.first else ()
    for plugin, entries in host.registry.call("acestep_epoch_finished", run=run, epoch=epoch, loss=loss):
        if not isinstance(entries, Mapping):
            raise PluginError(
                f"Plugin {plugin!r} returned {described(entries)} from acestep_epoch_finished, expected numbers "
                "and tensors by name."
            )
        for name, value in entries.items():
            if (wrong := _not_loggable(name, value)) is not None:
                raise PluginError(
                    f"Plugin {plugin!r} returned {wrong} from acestep_epoch_finished, expected numbers, or tensors of "
                    "finite values, by name."
                )
        for logger, (name, value) in product(loggers, entries.items()):
            if isinstance(value, int | float):
                logger.log_metrics({name: value}, epoch)
            elif hasattr(logger.experiment, "add_histogram"):
                logger.experiment.add_histogram(name, value, epoch)
    if getattr(trainer, "fabric", None) is None:  # without Lightning nothing is logged behind the last optimizer step
        between_epochs(host, trainer, run, epoch, loss)


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


def _watched(loader: Any, passes: Callable[[Callable[[], Iterator[Any]], int], Iterator[Any]]) -> Any:
    """Route every pass of a DataLoader through `passes`, which is given the loader's own iterator and its length.

    The loader stays an instance of upstream's class: Lightning inspects it closely.
    """
    own = type(loader)

    class Watched(own):  # type: ignore[misc, valid-type]
        def __iter__(self) -> Iterator[Any]:
            return passes(super().__iter__, len(self))

    Watched.__name__, Watched.__qualname__, Watched.__module__ = own.__name__, own.__qualname__, own.__module__
    loader.__class__ = Watched
    loader.worker_init_fn = ignored_in_worker(loader.worker_init_fn)  # whoever signals all processes means this one
    return loader
