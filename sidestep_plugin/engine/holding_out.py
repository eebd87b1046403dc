"""Songs that plugins hold out of a training: asked once, on the command line or when a training begins elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PluginError
from .answers import described

if TYPE_CHECKING:
    from ..registry import Registry


def held_out(
    registry: Registry, songs: Sequence[Path], options: Mapping[str, Any], training_config: Any
) -> tuple[Path, ...]:
    """The songs that are not trained on; () without a plugin that holds songs out.

    Raises:
        Refusal: a plugin refuses, or returns what are not songs, or all of them.
    """
    asked = {"songs": tuple(songs), "options": options, "training_config": training_config}
    for plugin, answer in registry.call("engine_hold_out", **asked):
        if not isinstance(answer, Sequence) or not all(isinstance(song, Path) for song in answer):
            raise PluginError(
                f"Plugin {plugin!r} returned {described(answer)} from engine_hold_out, expected some of the songs."
            )
        if strange := [song for song in answer if song not in songs]:
            raise PluginError(
                f"Plugin {plugin!r} returned {strange[0]} from engine_hold_out, expected some of the songs."
            )
        if answer and set(answer) >= set(songs):
            raise PluginError(
                f"Plugin {plugin!r} returned all {len(songs)} songs from engine_hold_out, expected to leave at least "
                "one to train on."
            )
        return tuple(answer)
    return ()
