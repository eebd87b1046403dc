"""What is done to a batch before its step, in this order: cut a window, zero hidden NaN, drop conditions.

The window comes first, so that less is left to do. Random numbers are drawn in the same order: windows, dropped rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sidestep_plugin import hookimpl
from sidestep_plugin.run import Step

from . import cfg_dropout, crops, nan_masking

if TYPE_CHECKING:
    import torch


@hookimpl
def acestep_prepare_batch(step: Step, batch: Mapping[str, Any]) -> Mapping[str, torch.Tensor] | None:
    options = step.run.options
    replaced: dict[str, torch.Tensor] = {}
    if options.get("crop_seconds") is not None:
        replaced = crops.cropped(step, batch)
    if options.get("mask_nan"):
        replaced |= nan_masking.zeroed(step, {**batch, **replaced})
    dropped = cfg_dropout.acestep_prepare_batch(step, {**batch, **replaced} if replaced else batch)
    return {**replaced, **dropped} if dropped and replaced else dropped or replaced or None
