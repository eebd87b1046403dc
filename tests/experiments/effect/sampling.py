"""Generation: Euler steps from noise at t = 1 to data at t = 0, evenly spaced (shift 1), with plain guidance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base_model import velocity


@torch.no_grad()
def generate(
    model: Any,
    conditions: Tensor,
    noise: Tensor,
    *,
    guidances: Sequence[float],
    steps: int,
    decoder: Any = None,
    null_decoder: Any = None,
) -> list[Tensor]:
    """Latents [N,T,C] for each guidance, from noise of that shape, one for each condition [N,L,D].

    The velocity is ``null + guidance * (conditioned - null)``; at guidance 1 there is no null pass. All guidances are
    computed in one batch. Draws no random number.

    Args:
        decoder: with the adapter; None: the base model's.
        null_decoder: what computes the null pass; None: `decoder`. The base model's own: "adapter off".
    """
    decoder = decoder or model.decoder
    ordered = sorted(guidances)
    plain = len(conditions) * sum(guidance == 1.0 for guidance in ordered)  # rows without a null pass come first
    x = noise.repeat(len(ordered), 1, 1)
    told = conditions.repeat(len(ordered), 1, 1)
    null = model.null_condition_emb.to(conditions).expand_as(told[plain:])
    scale = torch.tensor(ordered, device=x.device).repeat_interleave(len(conditions))[plain:, None, None]
    for step in range(steps):
        v = _velocities(model, x, 1.0 - step / steps, told, null, decoder, null_decoder)
        guided, free = v[plain : len(x)], v[len(x) :]
        x = x - torch.cat([v[:plain], free + scale * (guided - free)]) / steps
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
