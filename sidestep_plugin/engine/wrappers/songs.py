"""The songs: which files are listed, which of them are held out, and who reads one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import Refusal
from ...files import is_companion
from ...ranks import ranks
from ..current import running_training

if TYPE_CHECKING:
    from ..host import Host


def wrap_song_list(original: Callable[..., None]) -> Callable[..., None]:
    """Upstream's ``PreprocessedTensorDataset.__init__``, without macOS's companion files (``._song.pt``)."""

    @wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        for name in ("sample_paths", "valid_paths"):
            paths = getattr(self, name, None)
            if isinstance(paths, list):
                paths = [path for path in paths if not is_companion(Path(path).name)]
                # Machines may list a folder in different orders; several processes have to divide the same one.
                setattr(self, name, sorted(paths) if ranks().several else paths)

    return __init__


def wrap_setup(host: Host, original: Callable[..., Any]) -> Callable[..., Any]:
    """Upstream's ``PreprocessedDataModule.setup``, without held-out songs; the others stay in their order."""

    @wraps(original)
    def setup(self: Any, *args: Any, **kwargs: Any) -> Any:
        result, training = original(self, *args, **kwargs), running_training.get()
        if training is None:
            return result
        # Upstream may name a file in another way, through a link for example.
        out = {song.resolve() for song in training.run.held_out}
        songs = [Path(path) for path in getattr(self.train_dataset, "valid_paths", ())]
        left = [song for song in songs if song.resolve() not in out]
        with host.refusing():
            if songs and not left:
                raise Refusal(
                    f"All {len(songs)} songs that ACE-Step lists here are held out for validation. Hold out fewer."
                )
            host.registry.call("engine_songs_listed", run=training.run, songs=left)
        if out:
            for name in ("sample_paths", "valid_paths"):
                paths = getattr(self.train_dataset, name)
                paths[:] = [path for path in paths if Path(path).resolve() not in out]
        return result

    return setup


def wrap_song_reading(host: Host, original: Callable[..., Any]) -> Callable[..., Any]:
    """Upstream's ``PreprocessedTensorDataset.__getitem__``, asked only where no plugin answers."""
    import torch

    @wraps(original)
    def __getitem__(self: Any, index: Any) -> Any:
        training, file = running_training.get(), _file_of(self, index)
        # Every worker process would keep a copy of its own.
        if training is None or file is None or torch.utils.data.get_worker_info() is not None:
            return original(self, index)
        asked = {"run": training.run, "file": file, "read": partial(original, self, index)}
        with host.refusing():
            answers = host.registry.call("engine_read_song", **asked)
        return answers[0][1] if answers else original(self, index)

    return __getitem__


def _file_of(dataset: Any, index: Any) -> str | None:
    """The file of a song; None in versions of upstream that keep several songs in one file."""
    references = getattr(dataset, "sample_refs", None)
    if references:
        reference = references[index]
        return str(reference["path"]) if reference.get("type") == "file" else None
    paths = getattr(dataset, "valid_paths", None)
    return str(paths[index]) if isinstance(paths, list) else None
