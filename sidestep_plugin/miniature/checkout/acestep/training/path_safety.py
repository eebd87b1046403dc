"""Keeps training inside one folder: the current directory at import."""

from __future__ import annotations

import os

_SAFE_ROOT = os.path.realpath(os.getcwd())


def safe_path(user_path: str, *, base: str | None = None) -> str:
    """Return the real path; ValueError if it is outside `base` (by default the safe root).

    Trap, kept from ACE-Step: nothing is inside the root `/`, because the prefix looked for is then `//`.
    """
    root = os.path.realpath(base) if base is not None else _SAFE_ROOT
    path = os.path.realpath(os.path.join(root, user_path))
    if path == root or path.startswith(root + os.sep):
        return path
    raise ValueError(f"{user_path!r} is outside the safe root {root!r}")
