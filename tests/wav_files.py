"""Makes small WAV files for the tests, with nothing but Python."""

from __future__ import annotations

import math
import wave


def tone(level=0.5):
    return lambda second: level * math.sin(440.0 * 2.0 * math.pi * second)


def write_wav(file, seconds=1.0, *, rate=48_000, channels=2, width=2, sound=None):
    """A WAV file of a sine, or of what `sound` gives for a time in seconds, cut at full scale."""
    sound = sound or tone()
    top = 2 ** (8 * width - 1)
    raw = bytearray()
    for number in range(round(seconds * rate)):
        value = max(-top, min(top - 1, round(sound(number / rate) * top)))
        raw += (bytes([value + 128]) if width == 1 else value.to_bytes(width, "little", signed=True)) * channels
    file.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(file), "wb") as opened:
        opened.setparams((channels, width, rate, 0, "NONE", ""))
        opened.writeframes(bytes(raw))
    return file
