"""The data loaders: the journal counts their epochs, and a resumed run goes through recorded ones without reading."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

from ...signals import ignored_in_worker
from ..current import running_training
from ..devices import share_of_songs

if TYPE_CHECKING:
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
