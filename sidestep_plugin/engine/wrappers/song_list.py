"""The list of songs: leaves macOS's companion files (``._song.pt``) out, which upstream would read as songs."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from ...files import is_companion
from ...ranks import ranks


def wrap_song_list(original: Callable[..., None]) -> Callable[..., None]:
    """Upstream's ``PreprocessedTensorDataset.__init__``, without such files; other songs stay in their order."""

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
