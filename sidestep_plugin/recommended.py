"""Recommended settings by number of songs, each with where it comes from. Pure: numbers and sentences only.

They are what others recommend or use, not what this project has measured. Where sources disagree, the reason says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from .adapters.kinds import BY_NAME, DEFAULT

FEW_SONGS: Final = 20
MANY_SONGS: Final = 500

SETTINGS: Final = (
    "epochs", "rank", "alpha", "learning_rate", "batch_size", "gradient_accumulation", "warmup_steps", "save_every",
)  # fmt: skip
"""Option names of the settings that are recommended."""

TUTORIAL: Final = "ACE-Step's LoRA tutorial"


@dataclass(frozen=True)
class Recommendation:
    """One setting."""

    value: int | float  # as the option of that name takes it
    reason: str  # where it comes from


def recommended(
    songs: int, kind: str = DEFAULT.name, given: Mapping[str, Any] = MappingProxyType({}), processes: int = 1
) -> dict[str, Recommendation]:
    """The recommended settings by option name, in the order in which people ask for them.

    Args:
        songs: number of songs that are trained on.
        kind: name of the kind of adapter.
        given: settings that are decided already, by option name. They are left out, and the others go with them.
        processes: on how many GPUs it is trained.
    """
    epochs = _epochs(songs, kind)
    rounds, batch_size = int(given.get("epochs", epochs.value)), int(given.get("batch_size", 1))
    accumulation = int(given.get("gradient_accumulation", accumulation_for(songs, batch_size, processes)))
    own = {name: Recommendation(value, reason) for name, (value, reason) in BY_NAME[kind].recommended.items()}
    settings = {
        "epochs": epochs,
        "rank": own["rank"],
        "alpha": Recommendation(
            2 * int(given.get("rank", own["rank"].value)), "twice the rank, as in every default of ACE-Step's"
        ),
        "learning_rate": own["learning_rate"],
        "batch_size": Recommendation(1, f"{TUTORIAL}; raise it if the memory allows"),
        "gradient_accumulation": Recommendation(
            accumulation,
            "ACE-Step's default is 4; the largest up to 4 that divides the batches of an epoch, because some versions "
            "of ACE-Step handle the rest badly",
        ),
        "warmup_steps": Recommendation(
            warmup_for(songs, batch_size, rounds, accumulation, processes),
            "ACE-Step's default is 100; at most a tenth of the training, which is our own rule",
        ),
        "save_every": Recommendation(save_every_for(rounds), "ten checkpoints to compare, our own rule"),
    }
    return {name: setting for name, setting in settings.items() if name not in given}


def _epochs(songs: int, kind: str) -> Recommendation:
    if songs > MANY_SONGS:
        return Recommendation(
            100,
            "the default of ACE-Step's trainer, and what one published adapter of 1,300 songs used; the tutorial says "
            "nothing about so many songs",
        )
    if (usual := BY_NAME[kind].epochs) is not None:
        return Recommendation(*usual)
    if songs > FEW_SONGS:
        return Recommendation(500, f"{TUTORIAL}, for about 100 songs; the app's training tab has 1000")
    return Recommendation(
        800,
        f"{TUTORIAL}, for 10 to 20 songs; its own example has 13 songs and 500 epochs, and the app's training tab 1000",
    )


def batches_for(songs: int, batch_size: int, processes: int = 1) -> int:
    """Batches of an epoch in each process."""
    return max(1, math.ceil(math.ceil(songs / processes) / batch_size))


def accumulation_for(songs: int, batch_size: int, processes: int = 1) -> int:
    """Batches per optimizer step: the largest number up to 4 in all processes that divides the batches of an epoch."""
    batches = batches_for(songs, batch_size, processes)
    return next(each for each in (4, 3, 2, 1) if batches % each == 0 and (each == 1 or each * processes <= 4))


def warmup_for(songs: int, batch_size: int, epochs: int, accumulation: int, processes: int = 1) -> int:
    """Optimizer steps of warm-up: ACE-Step's 100, and at most a tenth of the training."""
    return min(100, epochs * batches_for(songs, batch_size, processes) // accumulation // 10)


def save_every_for(epochs: int) -> int:
    """Epochs between checkpoints, so that there are about ten."""
    return max(1, epochs // 10)
