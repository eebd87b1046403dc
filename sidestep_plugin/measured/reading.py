"""Reads measurements: the nearest card, seconds per step, and by how much estimates of memory were too low.

Pure: JSON files and arithmetic, without torch. Nothing is guessed where nothing was measured.
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from ..errors import Refusal
from ..files import read_json_object

CARDS: Final = Path(__file__).with_name("cards")  # where the measurements are that come with this package

SCHEMA_VERSION: Final = 1

ALONE: Final = "ACE-Step alone"
PLUGIN: Final = "plugin"
"""Names of ways to train: without the plugin, and with it at its defaults."""

_ALIKE: Final = 0.2  # decoders whose numbers of parameters differ by no more than this share take about as long


@dataclass(frozen=True)
class Card:
    """A GPU: its name as its driver says it, bytes of memory, and CUDA's number for what it can do, such as (8, 9)."""

    name: str
    memory: int
    capability: tuple[int, int]


@dataclass(frozen=True)
class Training:
    """A training that was measured, with batch size 1 and songs of one length."""

    size: str  # "2b" or "xl"; "tiny" is a trial
    parameters: int  # of the decoder
    song_seconds: float
    rank: int
    adapter: str  # "lora" or "lokr"
    way: str  # "ACE-Step alone", "plugin", or the plugin with one option
    seconds_per_step: float  # the median
    # allocated, reserved: bytes at the peak, of tensors and of all that torch took from the card.
    allocated: int
    reserved: int
    estimate: int | None  # bytes that the plugin estimates for the same settings; None where it makes no estimate


@dataclass(frozen=True)
class Measured:
    """Everything that was measured on one card."""

    file: str
    card: Card
    day: str  # when, as YYYY-MM-DD
    versions: Mapping[str, str | None]  # of the driver, torch, this package and so on, by name
    trainings: tuple[Training, ...]
    # What else was measured: hooks, validation, previews. Each entry says in `what` what it is.
    others: tuple[Mapping[str, Any], ...] = ()
    missing: tuple[Mapping[str, str], ...] = ()  # what was not measured, and why


def measurements() -> tuple[Measured, ...]:
    """All measurements in `CARDS`, by file name; read once in a process.

    Raises Refusal for a file that is damaged, of another schema, or of a dry run on a CPU.
    """
    return _read_all(CARDS)


@cache
def _read_all(folder: Path) -> tuple[Measured, ...]:
    return tuple(read(file) for file in sorted(folder.glob("*.json")))


def read(file: Path) -> Measured:
    """One file. Raises Refusal as :func:`measurements` does."""
    try:
        content = read_json_object(file)
    except (OSError, ValueError) as error:
        raise Refusal(f"{file} cannot be read ({error}). Measure again: python -m sidestep_plugin.gpu_report") from None
    if content.get("schema_version") != SCHEMA_VERSION:
        raise Refusal(
            f"{file} has schema_version {content.get('schema_version')!r}, expected {SCHEMA_VERSION}. Measure again "
            "with this version: python -m sidestep_plugin.gpu_report"
        )
    if content.get("device") != "cuda":
        raise Refusal(f"{file} was measured on {content.get('device')!r}, not on a GPU. Take it out of {file.parent}.")
    try:
        return Measured(
            file=file.name,
            card=Card(
                str(content["card"]["name"]),
                int(content["card"]["memory_bytes"]),
                (int(content["card"]["compute_capability"][0]), int(content["card"]["compute_capability"][1])),
            ),
            day=str(content["measured_on"]),
            versions=dict(content["versions"]),
            trainings=tuple(_training(entry) for entry in content["trainings"]),
            others=tuple(content["others"]),
            missing=tuple(content["not_measured"]),
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise Refusal(
            f"{file} is not as python -m sidestep_plugin.gpu_report writes it ({type(error).__name__}: {error}). "
            f"Take it out of {file.parent}, or measure again."
        ) from None


def _training(entry: Mapping[str, Any]) -> Training:
    seconds = float(entry["seconds_per_step"])
    if not math.isfinite(seconds) or seconds <= 0.0:
        raise ValueError(f"seconds_per_step {seconds}")
    estimate = entry["estimate_bytes"]
    return Training(
        size=str(entry["size"]),
        parameters=int(entry["decoder_parameters"]),
        song_seconds=float(entry["song_seconds"]),
        rank=int(entry["rank"]),
        adapter=str(entry["adapter"]),
        way=str(entry["way"]),
        seconds_per_step=seconds,
        allocated=int(entry["peak_allocated_bytes"]),
        reserved=int(entry["peak_reserved_bytes"]),
        estimate=None if estimate is None else int(estimate),
    )


# -- cards -----------------------------------------------------------------------------------------------------------


def nearest(card: Card | None, measured: Iterable[Measured]) -> Measured | None:
    """The measurements of the same card, else of the one most like it; None if there are none.

    Cards are alike when they compute alike (CUDA's compute capability) and, among those, have about as much memory.
    Without a card, it is the one with the least memory: who has no card here will not have a larger one.
    """
    listed = list(measured)
    if not listed:
        return None
    if card is None:
        return min(listed, key=lambda one: (one.card.memory, one.file))

    def unlike(one: Measured) -> tuple[Any, ...]:
        major, minor = (abs(its - ours) for its, ours in zip(one.card.capability, card.capability, strict=True))
        memory = abs(math.log(max(one.card.memory, 1) / max(card.memory, 1)))
        return one.card.name != card.name, major, minor, memory, one.file

    return min(listed, key=unlike)


def card_here(command: str = "nvidia-smi") -> Card | None:
    """The first NVIDIA card of this machine, asked of its driver; None if there is none.

    torch is not asked: it would begin to use the card, and CUDA_VISIBLE_DEVICES could not be set any more.
    """
    fields = driver_says("name,memory.total,compute_cap", command)
    try:
        name, memory, capability = fields
        major, _, minor = capability.partition(".")
        return Card(name, int(memory) * 2**20, (int(major), int(minor)))
    except ValueError:
        return None


def driver_says(fields: str, command: str = "nvidia-smi") -> list[str]:
    """Fields of the first card, as ``nvidia-smi --query-gpu`` calls them; [] if there is no such program or card."""
    line = [command, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(line, capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=10)
    except (OSError, subprocess.SubprocessError):
        return []
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    return [field.strip() for field in lines[0].split(",")] if lines else []


# -- time ------------------------------------------------------------------------------------------------------------


def seconds_per_step(
    measured: Measured, *, parameters: int, song_seconds: float, adapter: str = "lora", way: str = PLUGIN
) -> float | None:
    """Seconds that a step with one song takes on a card; None if nothing of the kind was measured there.

    Between two lengths that were measured it is a straight line. Shorter songs count as the shortest of them, and the
    time for longer ones grows with their length from the longest of them.

    A decoder with about as many parameters has to have been measured.
    """
    points = sorted(
        (one.song_seconds, one.seconds_per_step)
        for one in measured.trainings
        if (one.adapter, one.way) == (adapter, way) and abs(one.parameters - parameters) <= _ALIKE * parameters
    )
    if not points:
        return None
    (first, least), (last, most) = points[0], points[-1]
    if song_seconds <= first:
        return least
    for (left, one), (right, other) in pairwise(points):
        if left < song_seconds <= right:
            return one + (other - one) * (song_seconds - left) / (right - left)
    return most * song_seconds / last


def training_time(
    songs: int,
    *,
    parameters: int,
    song_seconds: float,
    adapter: str = "lora",
    way: str = PLUGIN,
    card: Card | None = None,
) -> str:
    """How long a training takes on the nearest card that was measured, in a few words; "" if that is not known.

    `songs` counts each song as often as there are epochs; `card` is that of this machine, if it is known. The others
    are as for :func:`seconds_per_step`.
    """
    found = nearest(card, measurements())
    if found is None:
        return ""
    seconds = seconds_per_step(found, parameters=parameters, song_seconds=song_seconds, adapter=adapter, way=way)
    if seconds is None:
        return ""
    where = f"measured on {found.card.name}"
    if card is not None and card.name != found.card.name:
        where += f", the nearest to your {card.name}"
    return f"about {duration(songs * seconds)} ({seconds:.2g} s for each song of {song_seconds:.0f} s, {where})"


def duration(seconds: float) -> str:
    """Such as "40 s", "25 min", "3 h 20 min": no more digits than an estimate deserves."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


# -- memory ----------------------------------------------------------------------------------------------------------


def too_low() -> float:
    """By which factor the worst estimate of memory was below the tensors that were really there; at least 1.

    This is the one place where measurements reach the advice: what is compared with free memory is multiplied by it
    (``memory.estimate.Needs.fits``). An estimate that was too high lowers nothing: that is for a person to decide, who
    has seen several cards.
    """
    ratios = [
        one.allocated / one.estimate
        for measured in measurements()
        for one in measured.trainings
        if one.estimate and one.size != "tiny"  # a tiny model is all rounding
    ]
    return max([1.0, *ratios])
