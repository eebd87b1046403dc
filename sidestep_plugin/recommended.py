"""Recommended settings by number of songs, each with where it comes from. Pure: numbers and sentences only.

They are what others recommend or use, not what this project has measured. Where sources disagree, the reason says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from .adapters.kinds import BY_NAME, DEFAULT

FEW_SONGS: Final = 20
MANY_SONGS: Final = 500

TUTORIAL: Final = "ACE-Step's LoRA tutorial"


@dataclass(frozen=True)
class Recommendation:
    """One setting.

    Attributes:
        value: as the option of that name takes it.
        reason: where it comes from.
    """

    value: int | float
    reason: str


def recommended(songs: int, kind: str = DEFAULT.name) -> dict[str, Recommendation]:
    """The recommended settings by option name, in the order in which people ask for them.

    Args:
        songs: number of songs in the dataset.
        kind: name of the kind of adapter.
    """
    epochs = _epochs(songs, kind)
    accumulation = accumulation_for(songs, 1)
    own = {name: Recommendation(value, reason) for name, (value, reason) in BY_NAME[kind].recommended.items()}
    return {
        "epochs": epochs,
        "rank": own["rank"],
        "alpha": Recommendation(128, "twice the rank, as in every default of ACE-Step's"),
        "learning_rate": own["learning_rate"],
        "batch_size": Recommendation(1, f"{TUTORIAL}; raise it if the memory allows"),
        "gradient_accumulation": Recommendation(
            accumulation,
            "ACE-Step's default is 4; the largest up to 4 that divides the batches of an epoch, because some versions "
            "of ACE-Step handle the rest badly",
        ),
        "warmup_steps": Recommendation(
            warmup_for(songs, 1, int(epochs.value), accumulation),
            "ACE-Step's default is 100; at most a tenth of the training, which is our own rule",
        ),
        "save_every": Recommendation(save_every_for(int(epochs.value)), "ten checkpoints to compare, our own rule"),
    }


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


def accumulation_for(songs: int, batch_size: int) -> int:
    """Batches per optimizer step: the largest number up to 4 that divides the batches of an epoch."""
    batches = max(1, -(-songs // batch_size))
    return next(each for each in (4, 3, 2, 1) if batches % each == 0)


def warmup_for(songs: int, batch_size: int, epochs: int, accumulation: int) -> int:
    """Optimizer steps of warm-up: ACE-Step's 100, and at most a tenth of the training."""
    return min(100, epochs * -(-songs // batch_size) // accumulation // 10)


def save_every_for(epochs: int) -> int:
    """Epochs between checkpoints, so that there are about ten."""
    return max(1, epochs // 10)
