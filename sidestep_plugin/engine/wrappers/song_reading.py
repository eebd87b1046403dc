"""Reading a song: a plugin may hand out what upstream would have read."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

from ...errors import Refusal
from ..current import running_training

if TYPE_CHECKING:
    from ..host import Host


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
        try:
            for _, song in host.registry.call("engine_read_song", **asked):
                return song
        except Refusal as refusal:  # upstream reports it as a failure
            host.refusal = refusal
            raise
        return original(self, index)

    return __getitem__


def _file_of(dataset: Any, index: Any) -> str | None:
    """The file of a song; None in versions of upstream that keep several songs in one file."""
    references = getattr(dataset, "sample_refs", None)
    if references:
        reference = references[index]
        return str(reference["path"]) if reference.get("type") == "file" else None
    paths = getattr(dataset, "valid_paths", None)
    return str(paths[index]) if isinstance(paths, list) else None
