"""The path guard: also accepts the folders that the user named, and nothing else."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

from ..checkout import beside


def guarded_modules(trainer: Any) -> Iterator[Any]:
    """Upstream's modules that use its path guard; none in versions without one."""
    package = str(getattr(trainer, "__name__", "")).rpartition(".")[0]
    guard = getattr(beside(trainer, "path_safety"), "safe_path", None)
    if guard is None:
        return
    for name, module in sorted(sys.modules.items()):
        if (name == package or name.startswith(f"{package}.")) and vars(module).get("safe_path") is guard:
            yield module


def wrap_path_guard(folders: tuple[Path, ...], guard: Callable[..., str]) -> Callable[..., str]:
    """Upstream's guard, which also accepts absolute paths inside the folders that the user named."""

    @wraps(guard)
    def safe_path(user_path: str, **kwargs: Any) -> str:
        try:
            return guard(user_path, **kwargs)
        except ValueError:
            path = Path(user_path)
            if kwargs.get("base") is None and path.is_absolute():
                resolved = path.resolve()
                if any(resolved.is_relative_to(folder) for folder in folders):
                    return str(resolved)
            raise

    return safe_path
