"""The files of clips: WAV files, and latents where nobody has decoded them yet. Only this file knows the formats."""

from __future__ import annotations

import array
import sys
import wave
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ..errors import Refusal
from ..files import not_a_file, replacing
from ..run import Clip
from ..text import sentence
from .conditions import LATENT_CHANNELS

if TYPE_CHECKING:
    import torch

_SOUND: Final = ".wav"
_LATENTS: Final = ".safetensors"


def suffix_of(content: Clip | torch.Tensor) -> str:
    """The suffix of a file for a clip, or for latents."""
    return _SOUND if isinstance(content, Clip) else _LATENTS


def is_sound(name: str) -> bool:
    """Whether a file of a clip is one that a browser plays; if not, it holds latents."""
    return name.endswith(_SOUND)


def write_clip(file: Path, content: Clip | torch.Tensor) -> None:
    """Write a clip, or latents, shape [1,T,64]. Raises OSError."""
    if isinstance(content, Clip):
        write_wav(file, content.samples, content.rate)
        return
    from safetensors.torch import save

    with replacing(file) as stream:
        stream.write(save({"latents": content.contiguous()}))


def read_latents(file: Path) -> torch.Tensor:
    """The latents in a file, shape [1,T,64]. Raises Refusal where they are missing, damaged or not finite."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        latents = load_file(file)["latents"]
        expected = f"expected finite numbers of shape [1,T,{LATENT_CHANNELS}]"
        fits = latents.dim() == 3 and latents.shape[0] == 1 and latents.shape[1] > 0
        fits = fits and latents.shape[2] == LATENT_CHANNELS and latents.is_floating_point()
        problem = "" if fits and bool(latents.isfinite().all()) else f"it holds {list(latents.shape)}, {expected}"
    except (SafetensorError, OSError, KeyError) as error:
        problem = not_a_file(file) or sentence(error).removesuffix(".")
    if problem:
        raise Refusal(
            f"The clip {file} cannot be decoded: {problem}. Make it again from the checkpoint, with --dataset-dir, or "
            f"delete the folder {file.parent.parent}."
        )
    return latents


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
