"""What is measured of an adapter: held-out loss by t, and distances between generated and held-out songs.

Songs are compared by features: the mean of each channel in either half, and the logarithm of each channel's power
spectrum over time in `BANDS` bands. They are scaled by the base domain's own spread.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sidestep_plugin.timesteps.schedule import max_of_two_logit_normal_cdf

from .base_model import MU, SIGMA, velocity
from .data import Songs

BANDS = 6
NEIGHBOURS = 5


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation of the features of the base domain, and a length for the MMD's kernel."""

    mean: Tensor
    deviation: Tensor
    bandwidth: float

    @classmethod
    def of(cls, latents: Tensor) -> Scale:
        raw = _raw_features(latents)
        mean, deviation = raw.mean(0), raw.std(0).clamp_min(1e-6)
        scaled = (raw - mean) / deviation
        return cls(mean, deviation, float(torch.pdist(scaled[:512]).median()))

    def features(self, latents: Tensor) -> Tensor:
        """[N,T,C] -> [N,F], in float64 on the CPU."""
        return (_raw_features(latents) - self.mean) / self.deviation


def _raw_features(latents: Tensor) -> Tensor:
    latents = latents.detach().to("cpu", torch.float64)
    halves = torch.cat([half.mean(1) for half in latents.chunk(2, dim=1)], dim=1)
    power = torch.fft.rfft(latents, dim=1).abs().square()[:, 1:]
    bands = torch.stack([band.mean(1) for band in power.tensor_split(BANDS, dim=1)], dim=1)
    return torch.cat([halves, (bands + 1e-3).log().flatten(1)], dim=1)


def energy_distance(one: Tensor, other: Tensor, *, biased: bool = False) -> float:
    """``2 E|X-Y| - E|X-X'| - E|Y-Y'|`` between two sets of features; unbiased, so it may be below 0.

    biased: with the zero distances of each song to itself, as for the noise floor.
    """
    return float(2 * torch.cdist(one, other).mean() - _within(one, biased) - _within(other, biased))


def _within(one: Tensor, biased: bool) -> Tensor:
    number = len(one)
    return torch.cdist(one, one).sum() / (number * (number if biased else number - 1))


def kernel_distance(one: Tensor, other: Tensor, bandwidth: float) -> float:
    """Squared MMD with a Gaussian kernel, unbiased, times 100 (the form of KAD, with these features)."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(a, b).square() / (2 * bandwidth**2))

    def within(a: Tensor) -> Tensor:
        values, number = kernel(a, a), len(a)
        return (values.sum() - values.trace()) / (number * (number - 1))

    return 100 * float(within(one) + within(other) - 2 * kernel(one, other).mean())


def density_and_coverage(real: Tensor, made: Tensor) -> tuple[float, float]:
    """Naeem et al. 2020: density above 1 means crowding (copies), coverage below 1 means lack of diversity."""
    k = min(NEIGHBOURS, len(real) - 1)
    radius = torch.cdist(real, real).kthvalue(k + 1, dim=1).values
    inside = torch.cdist(real, made) <= radius[:, None]
    return float(inside.sum() / (k * len(made))), float(inside.any(1).double().mean())


def nearest(songs: Tensor, training: Tensor) -> float:
    """Mean distance to the nearest training song."""
    return float(torch.cdist(songs, training).min(1).values.mean())


def compare(scale: Scale, made: Tensor, real: Tensor, training: Tensor | None = None) -> dict[str, float]:
    """All distances of generated latents."""
    ours, theirs = scale.features(made), scale.features(real)
    density, coverage = density_and_coverage(theirs, ours)
    found = {
        "energy": energy_distance(ours, theirs),
        "mmd": kernel_distance(ours, theirs, scale.bandwidth),
        "density": density,
        "coverage": coverage,
    }
    if training is not None:
        known = scale.features(training)
        found["copying"] = nearest(ours, known) / nearest(theirs, known)
    return found


def band_centres(bands: int) -> list[float]:
    return [(band + 0.5) / bands for band in range(bands)]


def law_weights(bands: int) -> list[float]:
    """The share of the model's own law in each band of t."""
    edges = [max_of_two_logit_normal_cdf(edge / bands, MU, SIGMA) for edge in range(bands + 1)]
    return [high - low for low, high in pairwise(edges)]


@torch.no_grad()
def held_out_losses(model: Any, songs: Songs, *, bands: int, seed: int, decoder: Any = None) -> dict[str, Any]:
    """The flow-matching loss in each band of t, with and without the condition, on fixed noise and fixed t.

    In each band every song has a t of its own, evenly spread over the band, and a noise of its own.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((bands, *songs.latents.shape), generator=generator).to(songs.latents)
    null = model.null_condition_emb.to(songs.conditions).expand_as(songs.conditions)
    number = len(songs)
    within = (torch.arange(number, device=noise.device) + 0.5) / number
    curves: dict[str, list[float]] = {"conditioned": [], "free": []}
    for band in range(bands):
        t = (band + within) / bands
        mixed = t[:, None, None] * noise[band] + (1 - t[:, None, None]) * songs.latents
        for name, conditions in (("conditioned", songs.conditions), ("free", null)):
            error = velocity(model, mixed, t, conditions, decoder) - (noise[band] - songs.latents)
            curves[name].append(float(error.square().mean()))
    weights = law_weights(bands)
    found: dict[str, Any] = {"curves": curves}
    for name, curve in curves.items():
        found[name] = sum(curve) / bands
        found[f"{name}, law"] = sum(w * loss for w, loss in zip(weights, curve, strict=True))
    return found
