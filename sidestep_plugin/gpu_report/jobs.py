"""What is measured, in the order of what is worth most. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from ..measured.reading import ALONE, PLUGIN
from ..memory.known import TWO_B, XL
from ..memory.sizes import DecoderSize

Kind = Literal["training", "validation", "previews", "hooks"]

WAYS: Final[Mapping[str, Mapping[str, Any] | None]] = {
    ALONE: None,
    PLUGIN: {},
    "checkpointing off": {"gradient_checkpointing": "off"},
    "checkpointing on": {"gradient_checkpointing": "on"},
    "int8": {"base_weights": "int8", "gradient_checkpointing": "on"},
    "compile": {"compile": True, "gradient_checkpointing": "off"},
}
"""Ways to train, with the plugin's options; None is without the plugin."""

_FIRST: Final = ((PLUGIN, "lora"), (ALONE, "lora"), ("checkpointing off", "lora"), ("checkpointing on", "lora"))
_THEN: Final = (("int8", "lora"), (PLUGIN, "lokr"), (ALONE, "lokr"))
_LAST: Final = (("compile", "lora"),)  # compiling takes minutes

SIZES: Final[Mapping[str, DecoderSize]] = {
    "tiny": DecoderSize(
        width=64, condition_width=64, feed_forward=128, layers=2, heads=4, key_value_heads=2, head_dim=16
    ),
    "2b": TWO_B,
    "xl": XL,
}
"""Sizes of models with random weights; XL's are replaced by those of its config.json where that is on the machine."""


@dataclass(frozen=True)
class Job:
    """One thing to measure, in a process of its own."""

    kind: Kind
    # size, way: names of `SIZES` and `WAYS`.
    size: str
    way: str
    adapter: Literal["lora", "lokr"]
    song_seconds: float
    rank: int
    songs: int  # number of songs; two epochs of them are trained, and the second one is measured
    device: str  # "cuda" or "cpu"
    root: str = ""  # folder of the ACE-Step checkout; "" for the miniature
    xl_config: str = ""  # a config.json to take XL's sizes from; "" for the built-in ones

    @property
    def name(self) -> str:
        """What a person reads."""
        songs = f"{self.size}, songs of {self.song_seconds:g} s"
        if self.kind == "hooks":
            return "hooks of a step"
        return f"{self.adapter}, {self.way}, {songs}" if self.kind == "training" else f"{self.kind}, {songs}"


def jobs(sizes: Sequence[str], lengths: Sequence[float], only: Collection[str], **settings: Any) -> Iterator[Job]:
    """The jobs of a report: the first length in all ways, what validation, previews and hooks cost, other lengths.

    `only` are the ways and kinds to measure, empty for all; `settings` the other attributes of the jobs.
    """

    def wanted(kind: Kind, pairs: Sequence[tuple[str, str]], size: str, seconds: float) -> Iterator[Job]:
        for way, adapter in pairs:
            if not only or (way if kind == "training" else kind) in only:
                yield Job(kind, size, way, adapter, seconds, **settings)  # type: ignore[arg-type]

    looks: tuple[Kind, ...] = ("validation", "previews")
    for size in sizes:
        yield from wanted("training", _FIRST + _THEN, size, lengths[0])
        for kind in looks:
            yield from wanted(kind, _FIRST[:1], size, lengths[0])
    yield from wanted("hooks", _FIRST[:1], "tiny", lengths[0])
    for size in sizes:
        for seconds in lengths[1:]:
            yield from wanted("training", _FIRST + _THEN, size, seconds)
    for size in sizes:
        yield from wanted("training", _LAST, size, lengths[0])
