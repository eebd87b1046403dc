"""What a training needs in memory, part by part, for given settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ..adapters.kinds import BY_NAME, DEFAULT
from ..measured.reading import too_low
from ..run import AdapterType
from .activations import activation_bytes, working_bytes
from .quantization import BYTES
from .sizes import DecoderSize, adapter_parameters

FRAMES_A_SECOND: Final = 25
"""Frames per second of ACE-Step 1.5's latents."""

MARGIN: Final = 1.1
"""What is estimated is taken this many times before it is compared with free memory: allocators keep blocks that they
cannot use, and matrix products need room of their own."""

USUAL_TOKENS: Final = 769
"""Length of a condition that upstream's preprocessing makes: 512 tokens of lyrics, 256 of the prompt, 1 of timbre."""

_BYTES: Final = {**BYTES, "bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Settings:
    """The settings of a training that its memory depends on."""

    kind: AdapterType = DEFAULT.name  # what is trained
    rank: int = 64  # of the adapter
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")  # names of the adapted linear layers
    dropout: bool = True  # whether a LoRA has dropout
    batch_size: int = 1  # songs in a batch
    accumulation: int = 4  # batches for each optimizer step, which costs no memory
    frames: int = 240 * FRAMES_A_SECOND  # length of the longest song in frames of latents
    tokens: int = USUAL_TOKENS  # length of the longest condition in tokens
    mixed: bool = True  # whether autocast computes in bf16, as on a GPU; else all weights are fp32
    frozen: str = "bf16"  # type of frozen linear and convolution layers: bf16, fp32, a quantized one; if `mixed`
    checkpointing: bool = False  # whether gradient checkpointing is on
    crop_seconds: float | None = None  # length of the windows of songs that are trained on; None: whole songs
    optimizer_bytes: int = 8  # bytes of the optimizer's state for each parameter: 8 for AdamW, 2 for its 8-bit form
    averaged: bool = False  # whether a running mean of the adapter is kept beside it, in fp32

    @property
    def trained_frames(self) -> int:
        """Frames of the longest song or window."""
        if self.crop_seconds is None:
            return self.frames
        return min(self.frames, max(1, int(self.crop_seconds * FRAMES_A_SECOND)))

    def but(self, **changes: object) -> Settings:
        """The same settings with some changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Saving:
    """One way to need less memory, for the estimate and for every advice."""

    option: str  # name of the plugin's option that it needs; "" for a setting that every training has
    apply: Callable[[Settings], Settings | None]  # the settings with it; None if it would change nothing
    flag: Callable[[Settings], str]  # what to type, for the settings with it
    cost: str  # what it costs, in a few words
    # A lower-case phrase for the settings without and with it; None for "use" and the flag.
    advice: Callable[[Settings, Settings], str] | None = None


@dataclass(frozen=True)
class Needs:
    """Bytes that a training needs at its peak."""

    weights: int  # the decoder's frozen weights
    adapter: int  # the trained parameters, and a running mean of them; the next two are theirs, too
    gradients: int
    optimizer: int
    activations: int  # what waits for the backward pass, and what exists beside it there

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))

    def fits(self, free: int) -> bool:
        """Whether that much free memory is enough, with the margin, and with what estimates were too low by on GPUs."""
        return self.total * MARGIN * too_low() <= free


PARTS: Final = tuple(field.name for field in dataclasses.fields(Needs))
"""Names of what is needed."""


def needs(size: DecoderSize, settings: Settings, *, weights: int | None = None, trained: int | None = None) -> Needs:
    """What a training needs. Each term's source is in ``sizes`` and ``activations``.

    Args:
        weights: bytes of the frozen weights, if they are known.
        trained: number of trained parameters, if it is known.
    """
    trained = adapter_parameters(size, settings.kind, settings.rank, settings.targets) if trained is None else trained
    return Needs(
        weights=weight_bytes(size, settings) if weights is None else weights,
        adapter=(8 if settings.averaged else 4) * trained,
        gradients=4 * trained,
        optimizer=settings.optimizer_bytes * trained,
        activations=activations(size, settings),
    )


def shown(number: int) -> str:
    """Bytes as a person reads them: GiB with one decimal, MiB below one GiB."""
    if number >= 2**30:
        return f"{number / 2**30:.1f} GiB"
    return f"{number / 2**20:.{0 if number >= 10 * 2**20 else 1}f} MiB"


def activations(size: DecoderSize, settings: Settings) -> int:
    """Bytes of activations at the peak."""
    waiting = activation_bytes(size, settings, mask_bytes=1 if settings.mixed else 4)
    return waiting + working_bytes(size, settings)


def weight_bytes(size: DecoderSize, settings: Settings) -> int:
    """Bytes of the decoder's weights. Norms and tables are fp32, and so is what a LoKr adapts."""
    each = _BYTES[settings.frozen] if settings.mixed else 4
    adapted = 0
    if BY_NAME[settings.kind].whole_difference:
        adapted = size.layers * sum(one * other for one, other in size.targets(settings.targets).values())
    return each * (size.cast_parameters - adapted) + 4 * (size.other_parameters + adapted)
