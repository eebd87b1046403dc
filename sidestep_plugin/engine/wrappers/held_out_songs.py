"""The list of songs to train on: what is held out of this training is taken off it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import Refusal
from ..current import running_training

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
            # Upstream may name a file in another way, through a link for example.
            out = {song.resolve() for song in training.run.held_out}
            songs = [Path(path) for path in getattr(self.train_dataset, "valid_paths", ())]
            left = [song for song in songs if song.resolve() not in out]
            if songs and not left:
                raise Refusal(
                    f"All {len(songs)} songs that ACE-Step lists here are held out for validation. Hold out fewer."
                )
            host.registry.call("engine_songs_listed", run=training.run, songs=left)
        except Refusal as refusal:  # upstream reports it as a failure
            host.refusal = refusal
            raise
        if out:
            for name in ("sample_paths", "valid_paths"):
                paths = getattr(self.train_dataset, name)
                paths[:] = [path for path in paths if Path(path).resolve() not in out]
        return result

    return setup
