"""Checks of what plugins return. Nothing is moved, cast or clipped for them: a wrong value is an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PluginError, unusable_answer
from ..run import FRAMES

if TYPE_CHECKING:
    import torch

    from ..registry import Registry


def checked_lines(plugin: str, hook: str, lines: Any) -> Sequence[str]:
    if not isinstance(lines, list | tuple) or not all(isinstance(line, str) for line in lines):
        raise unusable_answer(plugin, hook, repr(lines), "a list of lines")
    return lines


def counted(batch: Mapping[str, Any]) -> list[Any]:
    """The tensors of a batch of which torch counts how often they were written to."""
    return [value for value in batch.values() if hasattr(value, "_version") and not value.is_inference()]


def writes(tensors: list[Any]) -> list[int]:
    """How often each tensor was written to. No values are read."""
    return [tensor._version for tensor in tensors]


def check_replaced(plugin: str, batch: Mapping[str, Any], replaced: Mapping[str, Any], device: torch.device) -> None:
    """Check what a plugin returned for a batch. Raises PluginError that names the plugin and the entry."""
    shorter = _shortened(batch, replaced)
    for key, tensor in replaced.items():
        if key not in batch:
            found = f"an entry {key!r}, which the batch does not have ({', '.join(batch)})"
        elif getattr(tensor, "shape", None) != (wanted := _shape(batch, key, shorter)):
            found = f"{key!r} as {described(tensor)}, expected a tensor of shape {list(wanted)}"
            if key in FRAMES:
                found += f" (to shorten songs, return {', '.join(FRAMES)} with one smaller T)"
        elif tensor.is_floating_point() != batch[key].is_floating_point():
            kind = "floating" if batch[key].is_floating_point() else "whole"
            found = f"{key!r} as {described(tensor)}, expected {kind} numbers"
        elif tensor.device.type not in ("cpu", device.type, batch[key].device.type):
            found = f"{key!r} as {described(tensor)}, expected it on {device}"
        else:
            continue
        raise PluginError(f"Plugin {plugin!r} returned {found} from acestep_prepare_batch.")


def _shortened(batch: Mapping[str, Any], replaced: Mapping[str, Any]) -> int | None:
    """The smaller T that a plugin returned for all entries of frames at once; None if it did not."""
    if FRAMES[0] not in replaced:
        return None
    shapes: list[Any] = [getattr(replaced.get(name, batch.get(name)), "shape", ()) for name in FRAMES]
    lengths = {int(shape[1]) if len(shape) > 1 else 0 for shape in shapes}
    # Anything else would train on parts that do not belong together.
    return lengths.pop() if len(lengths) == 1 and 0 < min(lengths) < batch[FRAMES[0]].shape[1] else None


def _shape(batch: Mapping[str, Any], key: str, shorter: int | None) -> tuple[int, ...]:
    """The shape that an entry must have."""
    shape = tuple(batch[key].shape)
    return shape if shorter is None or key not in FRAMES else (shape[0], shorter, *shape[2:])


def check_timesteps(plugin: str, t: Any, batch_size: int, device: Any, dtype: torch.dtype, *, first: bool) -> None:
    import torch

    wanted = torch.device(device)
    if not isinstance(t, torch.Tensor):
        fits = False
    else:
        # "cuda" and "cuda:0" name the same place when there is no index to disagree on.
        same_index = wanted.index is None or t.device.index is None or wanted.index == t.device.index
        fits = t.shape == (batch_size,) and t.dtype == dtype and t.device.type == wanted.type and same_index
    # Reading values waits for the GPU, so they are checked in the first step only, where a mistake would show.
    if fits and (not first or bool(((t >= 0) & (t <= 1)).all())):
        return
    found = f"timesteps outside [0, 1] ({t.tolist()})" if fits else described(t)
    expected = f"{batch_size} values in [0, 1], shape [{batch_size}], {dtype} on {wanted}"
    raise unusable_answer(plugin, "acestep_sample_timesteps", found, expected)


def held_out(
    registry: Registry, songs: Sequence[Path], options: Mapping[str, Any], training_config: Any
) -> tuple[Path, ...]:
    """Ask once which songs are not trained on; () without a plugin that holds songs out.

    Raises:
        Refusal: a plugin refuses, or returns what are not songs, or all of them.
    """
    asked = {"songs": tuple(songs), "options": options, "training_config": training_config}
    for plugin, answer in registry.call("engine_hold_out", **asked):
        expected = "some of the songs"
        if not isinstance(answer, Sequence) or not all(isinstance(song, Path) for song in answer):
            found = described(answer)
        elif strange := [song for song in answer if song not in songs]:
            found = str(strange[0])
        elif answer and set(answer) >= set(songs):
            found, expected = f"all {len(songs)} songs", "to leave at least one to train on"
        else:
            return tuple(answer)
        raise unusable_answer(plugin, "engine_hold_out", found, expected)
    return ()


def described(value: Any) -> str:
    shape = getattr(value, "shape", None)
    if shape is None:
        kind = type(value).__name__
        return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
    return f"a tensor of shape {list(shape)}, {getattr(value, 'dtype', '?')} on {getattr(value, 'device', '?')}"
