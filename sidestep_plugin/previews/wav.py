"""WAV files: 16-bit PCM, written and measured with the standard library."""

from __future__ import annotations

import array
import sys
import wave
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import replacing

if TYPE_CHECKING:
    import torch


def playable(samples: torch.Tensor) -> torch.Tensor:
    """Samples within [-1, 1], shape [C,N]: what is louder is turned down as a whole, as ACE-Step does."""
    return samples / samples.abs().max().clamp(min=1.0)


def write_wav(file: Path, samples: torch.Tensor, rate: int) -> None:
    """Write samples, shape [C,N], floating point in [-1, 1], as 16-bit PCM. Raises OSError."""
    import torch

    interleaved = (samples.detach().float().cpu().clamp(-1.0, 1.0) * 32767.0).round().to(torch.int16).t().flatten()
    values = array.array("h", interleaved.tolist())
    if sys.byteorder == "big":
        values.byteswap()
    with replacing(file) as stream, wave.open(stream, "wb") as written:
        written.setnchannels(samples.shape[0])
        written.setsampwidth(2)
        written.setframerate(rate)
        written.writeframes(values.tobytes())
