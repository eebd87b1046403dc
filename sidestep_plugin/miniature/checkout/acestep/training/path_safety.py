"""Keeps training inside one folder: the current directory at import, or what `set_safe_root` names."""

from __future__ import annotations

import os

__all__ = ["get_safe_root", "safe_path", "set_safe_root"]

_SAFE_ROOT = os.path.realpath(os.getcwd())


def set_safe_root(root: str) -> None:
    """Allow what lies under `root` instead."""
    global _SAFE_ROOT
    _SAFE_ROOT = os.path.realpath(root)


def get_safe_root() -> str:
    """Return the folder that is allowed now."""
    return _SAFE_ROOT


def safe_path(user_path: str, *, base: str | None = None) -> str:
    """Return the real path; ValueError if it is outside `base` (by default the safe root).

    Trap, kept from ACE-Step: nothing is inside the root `/`, because the prefix looked for is then `//`.
    """
    root = os.path.realpath(base) if base is not None else _SAFE_ROOT
    path = os.path.realpath(os.path.join(root, user_path))
    if path == root or path.startswith(root + os.sep):
        return path
    raise ValueError(f"{user_path!r} is outside the safe root {root!r}")
