"""Generation: Euler steps from noise at t = 1 to data at t = 0, evenly spaced (shift 1), with guidance."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .base_model import velocity

Guide = Callable[[Tensor, Tensor], Tensor]
"""Makes one velocity of the conditioned one and the null pass's. A new one for every generation: it may remember."""


def plain(guidance: float) -> Guide:
    """``null + guidance * (conditioned - null)``."""
    return lambda conditioned, free: free + guidance * (conditioned - free)


def apg(guidance: float) -> Guide:
    """The checkout's own adaptive projected guidance, called as its ``generate_audio`` calls it."""
    code = importlib.import_module("acestep.models.common.apg_guidance")
    momentum = code.MomentumBuffer()

    def guide(conditioned: Tensor, free: Tensor) -> Tensor:
        guided: Tensor = code.apg_forward(
            pred_cond=conditioned,
            pred_uncond=free,
            guidance_scale=guidance,
            momentum_buffer=momentum,
            dims=[1],
        )
        return guided

    return guide


GUIDES: dict[str, Callable[[float], Guide]] = {"plain": plain, "apg": apg}


@torch.no_grad()
def generate(
    model: Any,
    conditions: Tensor,
    noise: Tensor,
    *,
    guidances: Sequence[float],
    steps: int,
    guide: str = "plain",
    decoder: Any = None,
    null_decoder: Any = None,
) -> list[Tensor]:
    """Latents [N,T,C] for each guidance, from noise of that shape, one for each condition [N,L,D].

    At guidance 1 there is no null pass. All guidances are computed in one batch. Draws no random number.

    Args:
        guide: a name in `GUIDES`.
        decoder: with the adapter; None: the base model's.
        null_decoder: what computes the null pass; None: `decoder`. The base model's own: "adapter off".
    """
    decoder = decoder or model.decoder
    ordered, rows = sorted(guidances), len(conditions)
    guides = [GUIDES[guide](guidance) for guidance in ordered if guidance != 1.0]
    alone = len(ordered) - len(guides)  # generations without a null pass come first
    x = noise.repeat(len(ordered), 1, 1)
    told = conditions.repeat(len(ordered), 1, 1)
    null = model.null_condition_emb.to(conditions).expand_as(told[alone * rows :])
    for step in range(steps):
        v = _velocities(model, x, 1.0 - step / steps, told, null, decoder, null_decoder).split(rows)  # type: ignore[no-untyped-call]
        conditioned, free = v[alone : len(ordered)], v[len(ordered) :]
        guided = [one(*pair) for one, *pair in zip(guides, conditioned, free, strict=True)]
        x = x - torch.cat([*v[:alone], *guided]) / steps
    made = dict(zip(ordered, x.chunk(len(ordered)), strict=True))
    return [made[guidance] for guidance in guidances]


def _velocities(model: Any, x: Tensor, t: float, told: Tensor, null: Tensor, decoder: Any, null_decoder: Any) -> Tensor:
    """The conditioned velocities of all rows, then those of the last rows with the null condition."""
    last = x[len(x) - len(null) :]

    def at(rows: Tensor) -> Tensor:
        return torch.full((len(rows),), t, device=rows.device)

    if null_decoder is None or not len(null):
        both = torch.cat([x, last])
        return velocity(model, both, at(both), torch.cat([told, null]), decoder)
    return torch.cat([velocity(model, x, at(x), told, decoder), velocity(model, last, at(last), null, null_decoder)])
