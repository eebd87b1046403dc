"""What a preview is generated with. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ..errors import Refusal
from ..text import counted
from ..variants import Variant

GUIDANCE_SCALE: Final = 7.0
"""Guidance scale of base and sft: what ACE-Step's own ``generate_audio`` and its app start with."""

SECONDS: Final = 20.0
SONGS: Final = "2"
SEED: Final = 42


@dataclass(frozen=True)
class PreviewSettings:
    """What every clip of a training is generated with."""

    shift: float
    steps: int  # number of denoising steps
    guidance: float  # scale of classifier-free guidance against the null condition; 1.0 is none
    seed: int  # of the noise. Song number i, from 0, has the noise of ``seed + i``.
    seconds: float  # length of a clip, unless the song is shorter

    @property
    def in_words(self) -> str:
        """Such as "50 steps, shift 1.0, CFG 7.0, seed 42"."""
        cfg = f"CFG {self.guidance:g}" if self.guidance > 1.0 else "no CFG"
        return f"{counted(self.steps, 'step')}, shift {self.shift:g}, {cfg}, seed {self.seed}"


def guidance_for(variant: Variant, said: float | None, option: str = "--preview-cfg") -> float:
    """The guidance scale of a variant: the user's, else its default. Raises Refusal for a scale for turbo."""
    if variant != "turbo":
        return GUIDANCE_SCALE if said is None else said
    if said is not None and said != 1.0:
        raise Refusal(
            f"{option} {said:g}: turbo models are generated without guidance, and their own code has none. "
            f"Leave {option} out."
        )
    return 1.0
