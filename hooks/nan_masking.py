"""Songs with values that are not finite: refuses them, or zeroes those that the mask hides (``--mask-nan``).

Preprocessing on some machines leaves NaN in rows that are padding. The model reads those rows too: 0 times NaN is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from sidestep_plugin import hookimpl
from sidestep_plugin.options import option
from sidestep_plugin.run import Run, Step
from sidestep_plugin.songs.dataset import songs_in
from sidestep_plugin.songs.one_song import MASK_OF
from sidestep_plugin.songs.values import check_values
from sidestep_plugin.text import counted

if TYPE_CHECKING:
    import torch


@hookimpl
def acestep_options() -> list[click.Option]:
    return [option("--mask-nan", "Zero NaN and infinity where a song's mask hides them.")]


@hookimpl
def acestep_run_started(run: Run) -> list[str]:
    """Refuse songs with values that are not finite. On the command line they have been read already."""
    mask_nan = bool(run.options.get("mask_nan"))
    songs = [] if run.tensor_dir is None else songs_in(run.tensor_dir)
    hidden = check_values(songs, mask_nan=mask_nan)
    if not mask_nan:
        return []
    if not hidden:
        return ["Note: --mask-nan changes nothing, all values of all songs are finite."]
    run.facts.append(lambda: {"mask_nan": True})
    return [f"NaN: set to zero in rows that the mask hides, in {hidden} of {counted(len(songs), 'song')} (--mask-nan)"]


@hookimpl
def acestep_prepare_batch(step: Step, batch: Mapping[str, Any]) -> dict[str, torch.Tensor] | None:
    """The tensors of a batch, where the step computes, with zeros for what is not finite in hidden rows.

    Nothing here waits for a GPU or draws a random number.
    """
    if not step.run.options.get("mask_nan"):
        return None
    zeroed = {}
    for name in MASK_OF.keys() & batch.keys():
        tensor = batch[name].to(step.device, dtype=step.dtype, non_blocking=True)
        hidden = batch[MASK_OF[name]].to(step.device, non_blocking=True) == 0
        finite = tensor.abs() < math.inf  # false for NaN, too
        zeroed[name] = tensor.masked_fill(hidden.unsqueeze(-1) & finite.logical_not(), 0.0)
    return zeroed
