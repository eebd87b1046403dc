"""The list of songs to train on: what a plugin holds out for validation is taken off it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import Refusal
from ..current import running_training
from ..holding_out import held_out

if TYPE_CHECKING:
    from ..host import Host


def wrap_setup(host: Host, original: Callable[..., Any]) -> Callable[..., Any]:
    """Upstream's ``PreprocessedDataModule.setup``; the songs that are left stay in their order."""

    @wraps(original)
    def setup(self: Any, *args: Any, **kwargs: Any) -> Any:
        result, training = original(self, *args, **kwargs), running_training.get()
        if training is None:
            return result
        try:
            songs = [Path(path) for path in getattr(self.train_dataset, "valid_paths", ())]
            out = set(held_out(host.registry, songs, host.options, training.run.training_config)) if songs else set()
            host.registry.call(
                "engine_songs_listed", run=training.run, songs=[song for song in songs if song not in out]
            )
        except Refusal as refusal:  # upstream reports it as a failure
            host.refusal = refusal
            raise
        if out:
            for name in ("sample_paths", "valid_paths"):
                paths = getattr(self.train_dataset, name)
                paths[:] = [path for path in paths if Path(path) not in out]
        return result

    return setup
