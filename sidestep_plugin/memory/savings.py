"""What makes a training need less memory, in the order of what it costs: one table for every message that advises."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Final

from ..adapters.kinds import BY_NAME
from .estimate import FRAMES_A_SECOND, Settings

_CROPS: Final = (120, 60, 30)
"""Seconds that are suggested for the windows of songs: the longest of them that halves the song."""


@dataclass(frozen=True)
class Saving:
    """One way to need less memory.

    Attributes:
        option: name of the plugin's option that it needs; "" for a setting that every training has.
        apply: the settings with it; None if it would change nothing.
        flag: what to type, for the settings before and after.
        advice: the same in words that begin with a small letter, with the values that are used now.
        cost: what it costs, in a few words.
    """

    option: str
    apply: Callable[[Settings], Settings | None]
    flag: Callable[[Settings], str]
    advice: Callable[[Settings, Settings], str]
    cost: str


def _frozen(now: Settings) -> Settings | None:
    return now.but(frozen="bf16") if now.mixed and now.frozen == "fp32" else None


def _checkpointing(now: Settings) -> Settings | None:
    return None if now.checkpointing else now.but(checkpointing=True)


def _crop(now: Settings) -> Settings | None:
    seconds = now.trained_frames / FRAMES_A_SECOND
    shorter = next((crop for crop in _CROPS if 2 * crop <= seconds), None)
    return None if shorter is None else now.but(crop_seconds=float(shorter))


def _batch(now: Settings) -> Settings | None:
    if now.batch_size == 1:
        return None
    return now.but(batch_size=1, accumulation=now.accumulation * now.batch_size)


def _rank(now: Settings) -> Settings | None:
    return now.but(rank=now.rank // 2) if now.rank > 1 else None


def _base(now: Settings) -> Settings | None:
    return now.but(frozen="int8") if now.mixed and BY_NAME[now.kind].quantizable and now.frozen != "int8" else None


SAVINGS: Final = (
    Saving(
        option="frozen_weights",
        apply=_frozen,
        flag=lambda then: "--frozen-weights bf16",
        advice=lambda now, then: "use --frozen-weights bf16",
        cost="same adapter, bit for bit",
    ),
    Saving(
        option="gradient_checkpointing",
        apply=_checkpointing,
        flag=lambda then: "--gradient-checkpointing on",
        advice=lambda now, then: "use --gradient-checkpointing on",
        cost="same adapter, bit for bit; steps take longer",
    ),
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
        advice=lambda now, then: f"use --crop-seconds {then.crop_seconds:g}",
        cost="trains on parts of the songs",
    ),
    Saving(
        option="",
        apply=_rank,
        flag=lambda then: f"--rank {then.rank}",
        advice=lambda now, then: f"lower --rank (now {now.rank}) to {then.rank}",
        cost="a smaller adapter",
    ),
    Saving(
        option="base_weights",
        apply=_base,
        flag=lambda then: "--base-weights int8",
        advice=lambda now, then: "use --base-weights int8",
        cost="rounds the base model's weights",
    ),
)
"""The cheapest first. Other names for the options are changed here alone."""


def savings_for(now: Settings, options: Collection[str]) -> Iterator[tuple[Saving, Settings]]:
    """Each saving that would still change something, with the settings that it and all before it lead to.

    Args:
        now: the settings of the training.
        options: names of the plugins' options that the training has.
    """
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
    """The cheapest flags with which a training fits, and its settings then; None if all of them are not enough.

    Args:
        now: the settings of the training.
        options: names of the plugins' options that the training has.
        fits: tells whether settings fit.
    """
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
    flags = []
    for saving in savings:
        then = saving.apply(now)
        if then is not None:
            flags.append(saving.flag(then))
            now = then
    return flags, now


def advice_for(now: Settings, options: Collection[str]) -> list[str]:
    """What to change, the cheapest first: each in words that begin with a small letter, and what it costs."""
    lines = []
    for saving, then in savings_for(now, options):
        lines.append(f"{saving.advice(now, then)} ({saving.cost})")
        now = then
    return lines
