"""What a patched checkout imports, by this name: it stands in other people's files, so it stays where it is."""

from __future__ import annotations

from .engine.autoload import load

__all__ = ["load"]
