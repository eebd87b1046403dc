"""What clips are generated with, and from: songs' own conditions, silence, and a mask that is full.

A preprocessed song holds the output of the condition encoder for its prompt and its lyrics, so no text encoder is
needed. Its context is not used: it may hold the song's own audio, from which the model would copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ..errors import Refusal
from ..songs.dataset import FRAMES_A_SECOND
from ..songs.one_song import read_song
from ..songs.triggers import metadata_of
from ..text import counted
from ..variants import Variant

if TYPE_CHECKING:
    import torch

GUIDANCE_SCALE: Final = 7.0
"""Guidance scale of base and sft: what ACE-Step's own ``generate_audio`` and its app start with."""

SECONDS: Final = 20.0
SONGS: Final = "2"
SEED: Final = 42

LATENT_CHANNELS: Final = 64
SILENCE: Final = "silence_latent.pt"
"""File in every model folder of ACE-Step 1.5: the latents of silence, shape [1,64,N]."""


@dataclass(frozen=True)
class Song:
    """A song that is heard: its preprocessed tensors, the length of its clips and its own, in frames of latents."""

    file: Path
    frames: int
    whole: int

    @property
    def name(self) -> str:
        return self.file.stem

    @property
    def prompt(self) -> str:
        """What it is to sound like, as the song itself says; "" if it does not."""
        return " ".join(str(metadata_of(self.file).get("caption") or "").split())

    @property
    def seconds(self) -> float:
        return self.frames / FRAMES_A_SECOND


@dataclass(frozen=True)
class Conditions:
    """What a clip is generated from, all on one device, in floating point of one type.

    The song's conditions [1,L,D] and their mask [1,L]; silence [1,T,64] and a mask of ones [1,T,64] side by side; and
    ones [1,T].
    """

    encoder_hidden_states: torch.Tensor
    encoder_attention_mask: torch.Tensor
    context_latents: torch.Tensor
    attention_mask: torch.Tensor


def choose_songs(files: Sequence[Path], wanted: str, option: str = "--preview-songs") -> list[Path]:
    """Pick the songs to hear among the files of all songs.

    `wanted` is a number, for songs that are evenly chosen, or names with commas between; `option` is named in messages.
    Raises Refusal if there are not so many, or none of that name.
    """
    if wanted.strip().isdecimal():
        number = int(wanted)
        if not 1 <= number <= len(files):
            there = "there is" if len(files) == 1 else "there are"
            raise Refusal(
                f"{option} {number}: {there} {counted(len(files), 'song')}. Expected 1 to {len(files)}, or "
                "names with commas between."
            )
        return [files[(2 * place + 1) * len(files) // (2 * number)] for place in range(number)]
    by_name = {name: file for file in files for name in (file.stem, file.name)}
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    unknown = [name for name in names if name not in by_name]
    if unknown or not names:
        listed = ", ".join(file.stem for file in files[:5]) + (", ..." if len(files) > 5 else ".")
        raise Refusal(
            f"{option}: no song is named {unknown[0] if unknown else wanted!r}. Expected a number, or names "
            f"with commas between: {listed}"
        )
    return list(dict.fromkeys(by_name[name] for name in names))


def look_at(file: Path, seconds: float) -> Song:
    """A song and the length of its clips, at most the song's own. Raises Refusal for a file that is no song."""
    tensors, problem = read_song(file)
    if problem:
        raise Refusal(f"No preview can be made of {file}: it {problem}. Preprocess the song again, or choose another.")
    whole = int(tensors["target_latents"].shape[0])
    return Song(file, min(whole, max(1, math.ceil(seconds * FRAMES_A_SECOND))), whole)


def read_silence(model_folder: Path) -> torch.Tensor:
    """The latents of silence of a model, shape [1,N,64]. Raises Refusal."""
    import torch

    file = model_folder / SILENCE
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise Refusal(
            f"Previews are generated from silence, and {model_folder} has no {SILENCE}. Download the model again, or "
            "leave previews out."
        ) from None
    except Exception as error:  # torch raises a dozen types for a damaged file
        raise Refusal(f"{file} cannot be read ({type(error).__name__}). Download the model again.") from None
    shape = list(getattr(stored, "shape", []))
    if len(shape) != 3 or shape[0] != 1 or shape[1] != LATENT_CHANNELS or shape[2] == 0:
        raise Refusal(f"{file} has shape {shape}, expected [1, {LATENT_CHANNELS}, N]. Download the model again.")
    silence: torch.Tensor = stored.transpose(1, 2)
    return silence


def silent_context(silence: torch.Tensor, frames: int) -> torch.Tensor:
    """The context of a generation from nothing, as ACE-Step's inference builds it, shape [1,frames,128].

    The first 64 channels are silence, repeated where it is too short; the others are 1: generate every frame.
    """
    import torch

    repeats = -(-frames // silence.shape[1])
    silent = silence.repeat(1, repeats, 1)[:, :frames]
    return torch.cat([silent, torch.ones_like(silent)], dim=-1)


def read_conditions(song: Song, silence: torch.Tensor, device: torch.device, dtype: torch.dtype) -> Conditions:
    """What a song's clips are generated from. NaN that the mask hides is zero. Draws no random number."""
    import torch

    tensors, problem = read_song(song.file)
    if problem:
        raise Refusal(f"{song.file} {problem}. Preprocess the song again.")
    states, mask = tensors["encoder_hidden_states"].to(dtype), tensors["encoder_attention_mask"]
    states = torch.where((mask == 0).unsqueeze(-1) & ~states.isfinite(), torch.zeros_like(states), states)
    context = silent_context(silence, song.frames).to(device, dtype)
    return Conditions(
        encoder_hidden_states=states.unsqueeze(0).to(device),
        encoder_attention_mask=mask.to(device, dtype).unsqueeze(0),
        context_latents=context,
        attention_mask=torch.ones(context.shape[:2], device=device, dtype=dtype),
    )


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
