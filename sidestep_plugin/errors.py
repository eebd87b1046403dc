"""What goes wrong, by who has to act. Every message says what was found, what was expected and what to do."""

from __future__ import annotations


class Refusal(Exception):
    """The run must not start, or must not go on: training wrongly for hours is the worst outcome.

    Raised before the first optimizer step. The command line prints the message and exits with code 2.
    """


class UpstreamMismatch(Refusal):
    """This checkout's trainer cannot be imported, or lacks a seam that the plugins need."""


class PluginError(Refusal):
    """A plugin is not installed, cannot be loaded, or answered a hook with something unusable."""


def unusable_answer(plugin: str, hook: str, found: object, expected: str) -> PluginError:
    """The error of a plugin that returned something unusable."""
    return PluginError(f"Plugin {plugin!r} returned {found} from {hook}, expected {expected}.")


class DetachError(RuntimeError):
    """Somebody replaced a name after us: restoring the original would remove their wrapper."""
