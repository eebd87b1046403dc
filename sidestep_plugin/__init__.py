"""Variant-aware training for ACE-Step 1.5's own trainer.

    from sidestep_plugin import attach

    with attach():          # the plugin "sidestep" on acestep.training.trainer
        ...                 # train as always

Plugin authors import :data:`hookimpl`; the hooks are described in :mod:`sidestep_plugin.hookspecs`.
Importing this package imports nothing else: each name is fetched when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False  # typing's own takes milliseconds to import, in which Ctrl-C would end with a traceback
if TYPE_CHECKING:
    from typing import Any, Final

    from .engine.attachment import Attachment, attach
    from .errors import DetachError, PluginError, Refusal, UpstreamMismatch
    from .hookspecs import hookimpl

__all__ = [
    "Attachment",
    "DetachError",
    "PluginError",
    "Refusal",
    "UpstreamMismatch",
    "__version__",
    "attach",
    "hookimpl",
]

__version__ = "0.1.0"

_PLACES: Final = {
    "Attachment": "engine.attachment",
    "attach": "engine.attachment",
    "hookimpl": "hookspecs",
    **dict.fromkeys(("DetachError", "PluginError", "Refusal", "UpstreamMismatch"), "errors"),
}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
