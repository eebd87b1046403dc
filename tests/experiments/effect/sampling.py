"""Generation: Euler steps from noise at t = 1 to data at t = 0, evenly spaced (shift 1), with plain guidance."""

from __future__ import annotations

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
    guidance: float,
    steps: int,
    decoder: Any = None,
    null_decoder: Any = None,
) -> Tensor:
    """Latents [N,T,C] from noise of that shape, one for each condition [N,L,D].

    The velocity is ``null + guidance * (conditioned - null)``. Draws no random number.

    Args:
        decoder: with the adapter; None: the base model's.
        null_decoder: what computes the null pass; None: `decoder`. The base model's own: "adapter off".
    """
    decoder = decoder or model.decoder
    null = model.null_condition_emb.to(conditions).expand_as(conditions)
    x = noise
    for step in range(steps):
        t = torch.full((len(x),), 1.0 - step / steps, device=x.device)
        if guidance == 1.0:
            v = velocity(model, x, t, conditions, decoder)
        elif null_decoder is None:
            both = velocity(model, torch.cat([x, x]), torch.cat([t, t]), torch.cat([conditions, null]), decoder)
            conditioned, free = both.chunk(2)
            v = free + guidance * (conditioned - free)
        else:
            free = velocity(model, x, t, null, null_decoder)
            v = free + guidance * (velocity(model, x, t, conditions, decoder) - free)
        x = x - v / steps
    return x
