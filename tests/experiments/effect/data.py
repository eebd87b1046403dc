"""Synthetic songs: latents with a known structure, and captions that tell a part of it.

A song has a timbre (a basis of `PARTIALS` directions among the channels), a pitch set (three chords, each a vector of
partials), a tempo (frames per beat), a phase, two sections with a chord each, and a loudness:

    latents[f] = SCALE * loudness * (chord[section(f)] * beat(f) + texture[f]) @ timbre + floor[f]

The caption tells timbre, pitch set and tempo. Phase, chords, sections and loudness are left to the model, so that
there is something to generate. SCALE gives the base domain variance 1 over all elements.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

PARTIALS = 3
CHORDS = 3
TOKENS = 4
PADDING = 8
TIMBRES, PITCH_SETS = 4, 4
TEXTURE, FLOOR = 0.25, 0.15
SCALE = 1.55
"""For 12 channels, measured once with 10,000 songs."""


@dataclass(frozen=True)
class Domain:
    """A family of songs.

    Attributes:
        timbres: [timbres, PARTIALS, channels], rows of unit length.
        pitch_sets: [sets, CHORDS, PARTIALS].
        tempos: frames per beat.
        captions: [3, choices, width]: embeddings of each timbre, pitch set and tempo.
        opening: [width], the first token of every caption.
    """

    timbres: Tensor
    pitch_sets: Tensor
    tempos: tuple[int, ...]
    captions: tuple[Tensor, Tensor, Tensor]
    opening: Tensor


@dataclass(frozen=True)
class Songs:
    """latents [N,T,C] and conditions [N,TOKENS,width]."""

    latents: Tensor
    conditions: Tensor

    def __len__(self) -> int:
        return len(self.latents)

    def to(self, device: str) -> Songs:
        return Songs(self.latents.to(device), self.conditions.to(device))


def base_domain(channels: int, width: int, seed: int = 11) -> Domain:
    """What the base model is trained on: 4 timbres, 4 pitch sets, 3 tempos."""
    generator = torch.Generator().manual_seed(seed)
    return Domain(
        timbres=_bases(TIMBRES, channels, generator),
        pitch_sets=_unit(torch.randn(PITCH_SETS, CHORDS, PARTIALS, generator=generator)),
        tempos=(4, 6, 8),
        captions=tuple(torch.randn(number, width, generator=generator) for number in (TIMBRES, PITCH_SETS, 3)),  # type: ignore[arg-type]
        opening=torch.randn(width, generator=generator),
    )


def target_domain(kind: str, base: Domain, seed: int) -> Domain:
    """A new domain, drawn with `seed`.

    near: one timbre halfway between two of the base model's, two of its pitch sets, two of its tempos.
    far: one timbre, two pitch sets and two tempos that it never met. Both have captions that it never met.
    """
    generator = torch.Generator().manual_seed(1000 + seed)
    width, channels = base.opening.shape[0], base.timbres.shape[-1]
    first, second = torch.randperm(TIMBRES, generator=generator)[:2].tolist()
    if kind == "near":
        timbres = _orthonormal(base.timbres[[first]] + base.timbres[[second]])
        chosen = torch.randperm(PITCH_SETS, generator=generator)[:2]
        pitch_sets, pitch_captions = base.pitch_sets[chosen], base.captions[1][chosen]
        kept = sorted(torch.randperm(3, generator=generator)[:2].tolist())
        tempos, tempo_captions = tuple(base.tempos[i] for i in kept), base.captions[2][kept]
    elif kind == "far":
        timbres = _bases(1, channels, generator)
        pitch_sets = _unit(torch.randn(2, CHORDS, PARTIALS, generator=generator))
        pitch_captions = torch.randn(2, width, generator=generator)
        tempos, tempo_captions = (5, 7), torch.randn(2, width, generator=generator)
    else:
        raise ValueError(f"no domain is called {kind!r}; there are near and far")
    trigger = torch.randn(1, width, generator=generator)
    return Domain(timbres, pitch_sets, tempos, (trigger, pitch_captions, tempo_captions), base.opening)


def draw(domain: Domain, number: int, frames: int, seed: int) -> Songs:
    """`number` songs of a domain, from a generator of their own."""
    generator = torch.Generator().manual_seed(seed)

    def choose(choices: int, *shape: int) -> Tensor:
        return torch.randint(choices, (number, *shape), generator=generator)

    timbre, pitch, tempo = choose(len(domain.timbres)), choose(len(domain.pitch_sets)), choose(len(domain.tempos))
    period = torch.tensor(domain.tempos)[tempo]
    phase = (torch.rand(number, generator=generator) * period).long()
    chords = domain.pitch_sets[pitch][torch.arange(number)[:, None], choose(CHORDS, 2)]  # [N,2,PARTIALS]
    boundary = frames * (1 + choose(3)) // 4
    loudness = (0.15 * torch.randn(number, generator=generator)).exp()

    frame = torch.arange(frames)
    beat = torch.cos(2 * torch.pi * (frame + phase[:, None]) / period[:, None])  # [N,T]
    second = (frame >= boundary[:, None]).long()
    played = torch.gather(chords, 1, second[:, :, None].expand(-1, -1, PARTIALS))  # [N,T,PARTIALS]
    texture = TEXTURE * torch.randn(number, frames, PARTIALS, generator=generator)
    sound = (played * (1.0 + beat[:, :, None]) + texture) @ domain.timbres[timbre]
    channels = domain.timbres.shape[-1]
    sound = SCALE * (channels / 12) ** 0.5 * loudness[:, None, None] * sound
    latents = sound + FLOOR * torch.randn(number, frames, channels, generator=generator)
    told = [captions[choice] for captions, choice in zip(domain.captions, (timbre, pitch, tempo), strict=True)]
    conditions = torch.stack([domain.opening.expand_as(told[0]), *told], dim=1)
    return Songs(latents, conditions)


def as_preprocessed(conditions: Tensor) -> Tensor:
    """Conditions [N,TOKENS,width] as upstream's preprocessing would make them: [N, TOKENS - 1 + PADDING, width].

    The opening token is missing, as the header of the lyrics is, and rows follow that no generation has: one vector,
    repeated, since every pad token is encoded alike. The base model has met neither.
    """
    number, _, width = conditions.shape
    pad = torch.randn(width, generator=torch.Generator().manual_seed(77)).to(conditions)
    return torch.cat([conditions[:, 1:], pad.expand(number, PADDING, width)], dim=1)


def write_songs(folder: Path, songs: Songs) -> None:
    """Save songs as ACE-Step's preprocessing does, one file each, for upstream's trainer."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (latents, condition) in enumerate(zip(songs.latents, songs.conditions, strict=True)):
        song = {
            "target_latents": latents.clone(),
            "attention_mask": torch.ones(len(latents)),
            "encoder_hidden_states": condition.clone(),
            "encoder_attention_mask": torch.ones(len(condition)),
            "context_latents": context(1, *latents.shape)[0],
            "metadata": {},
        }
        torch.save(song, folder / f"song_{number:03d}.pt")


def context(number: int, frames: int, channels: int, device: str = "cpu") -> Tensor:
    """Context latents of a text-to-music job: silence, and a mask that says "generate everything"."""
    shape = (number, frames, channels)
    return torch.cat([torch.zeros(shape, device=device), torch.ones(shape, device=device)], dim=-1)


def _bases(number: int, channels: int, generator: torch.Generator) -> Tensor:
    return _orthonormal(torch.randn(number, PARTIALS, channels, generator=generator))


def _orthonormal(rows: Tensor) -> Tensor:
    """The nearest orthonormal rows: between two timbres, that is the one halfway."""
    left, _, right = torch.linalg.svd(rows, full_matrices=False)
    nearest: Tensor = left @ right
    return nearest


def _unit(chords: Tensor) -> Tensor:
    """Chords whose length is the root of PARTIALS: partials of size about 1."""
    unit: Tensor = PARTIALS**0.5 * chords / chords.norm(dim=-1, keepdim=True)
    return unit
