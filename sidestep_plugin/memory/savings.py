"""What makes a training need less memory, in the order of what it costs: one list for every message that advises.

What a saving does to the estimate stands beside the saving itself; here are those that are no feature of this package.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Final

from . import base_weights, gradient_checkpointing
from .estimate import FRAMES_A_SECOND, Saving, Settings

_CROPS: Final = (120, 60, 30)
"""Seconds that are suggested for the windows of songs: the longest of them that halves the song."""


def _crop(now: Settings) -> Settings | None:
    seconds = now.trained_frames / FRAMES_A_SECOND
    shorter = next((crop for crop in _CROPS if 2 * crop <= seconds), None)
    return None if shorter is None else now.but(crop_seconds=float(shorter))


def _batch(now: Settings) -> Settings | None:
    if now.batch_size == 1:
        return None
    return now.but(batch_size=1, accumulation=now.accumulation * now.batch_size)


SAVINGS: Final = (
    base_weights.BF16,
    gradient_checkpointing.SAVING,
    Saving(
        option="",
        apply=_batch,
        flag=lambda then: f"--batch-size 1 --gradient-accumulation {then.accumulation}",
        advice=lambda now, then: (
            f"lower --batch-size (now {now.batch_size}) to 1 and raise --gradient-accumulation (now "
            f"{now.accumulation}) to {then.accumulation}"
        ),
        cost="as many songs for each optimizer step",
    ),
    Saving(
        option="crop_seconds",
        apply=_crop,
        flag=lambda then: f"--crop-seconds {then.crop_seconds:g}",
        cost="trains on parts of the songs",
    ),
    Saving(
        option="",
        apply=lambda now: now.but(rank=now.rank // 2) if now.rank > 1 else None,
        flag=lambda then: f"--rank {then.rank}",
        advice=lambda now, then: f"lower --rank (now {now.rank}) to {then.rank}",
        cost="a smaller adapter",
    ),
    base_weights.INT8,
)
"""The cheapest first."""


def savings_for(now: Settings, options: Collection[str]) -> Iterator[tuple[Saving, Settings]]:
    """Each saving that would still change something, with the settings that it and all before it lead to."""
    for saving in SAVINGS:
        if saving.option and saving.option not in options:
            continue
        then = saving.apply(now)
        if then is not None:
            yield saving, then
            now = then


def enough(
    now: Settings, options: Collection[str], fits: Callable[[Settings], bool]
) -> tuple[list[str], Settings] | None:
    """The cheapest flags with which a training fits, and its settings then; None if all of them are not enough."""
    chosen: list[Saving] = []
    for saving, then in savings_for(now, options):
        chosen.append(saving)
        if fits(then):
            break
    else:
        return None
    # What a later saving made unnecessary is left out, the costliest first.
    for saving in reversed(chosen[:-1]):
        fewer = [other for other in chosen if other is not saving]
        if fits(_with(now, fewer)[1]):
            chosen = fewer
    return _with(now, chosen)


def _with(now: Settings, savings: list[Saving]) -> tuple[list[str], Settings]:
    flags: list[str] = []
    for saving in savings:
        then = saving.apply(now)
        if then is not None:
            flags = with_flag(flags, saving.flag(then))
            now = then
    return flags, now


def with_flag(flags: Sequence[str], flag: str) -> list[str]:
    """Flags with one more, in place of those with another value for the same option."""
    option = flag.partition(" ")[0]
    return [*(other for other in flags if other.partition(" ")[0] != option), flag]


def advice_for(now: Settings, options: Collection[str]) -> list[str]:
    """What to change, the cheapest first: each as a lower-case phrase, with what it costs."""
    lines = []
    for saving, then in savings_for(now, options):
        advice = f"use {saving.flag(then)}" if saving.advice is None else saving.advice(now, then)
        lines.append(f"{advice} ({saving.cost})")
        now = then
    return lines
