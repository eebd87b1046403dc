"""Variant-aware training for ACE-Step 1.5's own trainer.

    from sidestep_plugin import attach

    with attach():          # the plugin "sidestep" on acestep.training.trainer
        ...                 # train as always

Plugin authors import :data:`hookimpl`; the hooks are described in :mod:`sidestep_plugin.hookspecs`.
Importing this package does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .attach import Attachment, attach
from .errors import DetachError, PluginError, Refusal, UpstreamMismatch

if TYPE_CHECKING:
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


def __getattr__(name: str) -> Any:
    # The marker brings pluggy, which a command that only prints its help does not need.
    if name == "hookimpl":
        from .hookspecs import hookimpl

        return hookimpl
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
