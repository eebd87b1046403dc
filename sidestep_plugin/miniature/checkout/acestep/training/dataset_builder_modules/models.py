"""One song of a dataset, as the user describes it."""

from __future__ import annotations

import uuid
from dataclasses import dataclass


@dataclass
class AudioSample:
    """As in ACE-Step, a song's name is random and new in every scan."""

    id: str = ""
    audio_path: str = ""
    filename: str = ""
    caption: str = ""
    lyrics: str = "[Instrumental]"
    bpm: int | float | str | None = None
    keyscale: str = ""
    timesignature: str = ""
    duration: int = 0
    language: str = "unknown"
    is_instrumental: bool = True
    custom_tag: str = ""
    labeled: bool = False

    def __post_init__(self) -> None:
        self.id = self.id or uuid.uuid4().hex[:8]
