"""Measures one adapter: held-out loss, generation at several guidances, and the old domain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from . import data
from .base_model import with_adapter
from .measures import Scale, compare, held_out_losses
from .presets import Preset
from .runs import SCALE, Cell
from .sampling import generate


@dataclass
class Bench:
    """What every measurement needs: the preset, the base model, the scale of the features, the base domain."""

    preset: Preset
    model: Any
    scale: Scale
    domain: data.Domain

    def held_out(self, domain: data.Domain, seed: int) -> data.Songs:
        return data.draw(domain, self.preset.held_out, self.preset.frames, seed).to(self.preset.device)


def noise_like(songs: data.Songs, seed: int) -> torch.Tensor:
    """The same noise for every adapter of a seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(songs.latents.shape, generator=generator).to(songs.latents)


def evaluate(
    bench: Bench, cell: Cell, target: data.Domain, training: data.Songs, weights: dict[str, Any] | None, last: bool
) -> dict[str, Any]:
    """The measures of one adapter (None: of the base model).

    Args:
        last: whether the training ended here: all guidances then, one of them also with the adapter off on the null
            pass, and the old domain. Otherwise the preset's `early` guidances and the held-out losses.
    """
    preset, model = bench.preset, bench.model
    decoder = model.decoder if weights is None else with_adapter(model, weights, SCALE)
    new = bench.held_out(target, 3000 + cell.seed)
    reference = data.draw(target, preset.held_out, preset.frames, 4000 + cell.seed)
    found: dict[str, Any] = {
        "loss": held_out_losses(model, new, bands=preset.bands, seed=5000 + cell.seed, decoder=decoder)
    }
    guidances = preset.guidances if last else preset.early
    jobs = [("", guidances, None)]
    if last and weights is not None:
        jobs.append((", adapter off on null", (preset.adapter_off,), model.decoder))
    for how, wanted, null_decoder in jobs if guidances else ():
        noise = noise_like(new, 6000 + cell.seed)
        many = generate(
            model,
            new.conditions,
            noise,
            guidances=wanted,
            steps=preset.generation_steps,
            guide=preset.guide,
            decoder=decoder,
            null_decoder=null_decoder,
        )
        for guidance, made in zip(wanted, many, strict=True):
            found[f"guidance {guidance:g}{how}"] = compare(bench.scale, made, reference.latents, training.latents)
    if not last:
        return found
    old = bench.held_out(bench.domain, 7000)
    reference = data.draw(bench.domain, preset.held_out, preset.frames, 7001)
    found["old loss"] = held_out_losses(model, old, bands=preset.bands, seed=7002, decoder=decoder)
    (made,) = generate(
        model, old.conditions, noise_like(old, 7003), guidances=[1.0], steps=preset.generation_steps, decoder=decoder
    )
    found["old domain"] = compare(bench.scale, made, reference.latents)
    return found
