"""The data loaders: the journal counts their epochs, and a resumed run goes through recorded ones without reading."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

from ...signals import ignored_in_worker
from ..current import running_training
from ..devices import share_of_songs
from ..journal import Journal

if TYPE_CHECKING:
    from ..host import Host


def wrap_loader(host: Host, original: Callable[..., Any], *, trains: bool) -> Callable[..., Any]:
    """Route every pass of a loader that upstream makes through the journal.

    The training loader also gets its share of the songs if there are several processes.
    """
    passes = Journal.epoch if trains else Journal.validation

    @wraps(original)
    def loader(*args: Any, **kwargs: Any) -> Any:
        made, training = original(*args, **kwargs), running_training.get()
        if made is None or training is None or training.journal is None:
            return made
        through = partial(passes, training.journal, training.run)
        if not trains or not training.run.ranks.several:
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


@contextmanager
def _without_a_seed(loader: Any) -> Iterator[None]:
    """Begin a pass without drawing a seed for its worker processes from torch's global generator.

    Persistent workers are started, and their seed is drawn, in the first pass of a loader. In a resumed training that
    pass was replayed, and one number drawn later would shuffle the songs, and make all noise, otherwise than without
    the stop. What reads songs draws nothing, so the seed itself does not matter.
    """
    import torch

    before, loader.generator = loader.generator, torch.Generator().manual_seed(torch.initial_seed())
    try:
        yield
    finally:
        loader.generator = before


def _watched(loader: Any, passes: Callable[[Callable[[], Iterator[Any]], int], Iterator[Any]]) -> Any:
    """Route every pass of a DataLoader through `passes`, which is given the loader's own iterator and its length.

    The loader stays an instance of upstream's class: Lightning inspects it closely.
    """
    own = type(loader)
    count, begun = 0, False

    class Watched(own):  # type: ignore[misc, valid-type]
        def __iter__(self) -> Iterator[Any]:
            nonlocal count
            count += 1
            return passes(partial(self._begin, super().__iter__, count), len(self))

        def _begin(self, begin: Callable[[], Iterator[Any]], number: int) -> Iterator[Any]:
            nonlocal begun
            late, begun = number > 1 and not begun, True
            with _without_a_seed(self) if late and self.persistent_workers else nullcontext():
                return begin()

    Watched.__name__, Watched.__qualname__, Watched.__module__ = own.__name__, own.__qualname__, own.__module__
    loader.__class__ = Watched
    loader.worker_init_fn = ignored_in_worker(loader.worker_init_fn)  # whoever signals all processes means this one
    return loader
