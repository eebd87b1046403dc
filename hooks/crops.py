"""Trains on a random window of each song (``--crop-seconds``), a new one every time the song is seen.

Shorter batches need less memory and time. Latents, mask and context are cut alike; the conditions stay those of the
whole song. Songs that are shorter than the window stay whole, and validation always sees whole songs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from sidestep_plugin import hookimpl
from sidestep_plugin.options import FiniteFloat, option
from sidestep_plugin.run import FRAMES, Run, Step
from sidestep_plugin.songs.dataset import FRAMES_A_SECOND
from sidestep_plugin.songs.one_song import frames_in
from sidestep_plugin.text import counted

if TYPE_CHECKING:
    import torch


@hookimpl
def acestep_options() -> list[click.Option]:
    text = "Train on a random window of S seconds of each song.  [default: whole songs]"
    return [option("--crop-seconds", text, FiniteFloat(0.2), "S")]


@hookimpl
def acestep_run_started(run: Run) -> list[str]:
    """Say what is cut, and whether anything is."""
    window = window_of(run)
    if window is None:
        return []
    seconds = run.options["crop_seconds"]
    lengths = [] if run.engine is None else [frames_in(file) for file in run.engine.songs]
    if lengths and max(lengths) <= window:
        longest = max(lengths) / FRAMES_A_SECOND
        return [f"Note: --crop-seconds {seconds:g} changes nothing, the longest song has {longest:.1f} s."]
    run.facts.append(lambda: {"crop_seconds": seconds})
    longer = sum(length > window for length in lengths)
    how_many = (
        f" ({longer} of {counted(len(lengths), 'song')} {'is' if longer == 1 else 'are'} longer)" if lengths else ""
    )
    return [
        f"Crops: a random window of {seconds:g} s, a new one each time a song is seen{how_many}",
        "Note: prompt and lyrics stay those of the whole song, also where a window sings only a part of them.",
    ]


def window_of(run: Run) -> int | None:
    """Length of the window in frames of latents; None for whole songs."""
    seconds = run.options.get("crop_seconds")
    return None if seconds is None else max(1, round(seconds * FRAMES_A_SECOND))


@hookimpl
def acestep_prepare_batch(step: Step, batch: Mapping[str, Any]) -> dict[str, torch.Tensor] | None:
    """Latents, mask and context of a training step, cut to a window; None when there is nothing to cut.

    Each row has its own window, within the frames that its mask shows; a row with fewer frames keeps its beginning,
    which is all of it. Nothing here waits for a GPU: the lengths stay where the step computes.

    Random numbers: one per row, uniform in [0, 1), from the default generator of ``step.device``; none when no song of
    the batch is longer than the window.
    """
    window = window_of(step.run)
    if window is None or not step.training or batch["attention_mask"].shape[1] <= window:
        return None
    import torch

    there = {name: batch[name].to(step.device, non_blocking=True) for name in FRAMES}
    rows, frames = there["attention_mask"].shape
    numbers = torch.arange(1, frames + 1, device=step.device)
    shown = ((there["attention_mask"] != 0) * numbers).amax(dim=1)  # number of the last frame that the mask shows
    last = (shown - window).clamp(min=0)
    # In float32 a product may round up to `last + 1`.
    first = (torch.rand((rows,), device=step.device) * (last + 1)).long().minimum(last)
    places = first.unsqueeze(1) + numbers.narrow(0, 0, window) - 1
    return {
        name: tensor.gather(1, places.view(rows, window, *([1] * (tensor.dim() - 2))).expand(-1, -1, *tensor.shape[2:]))
        for name, tensor in there.items()
    }
