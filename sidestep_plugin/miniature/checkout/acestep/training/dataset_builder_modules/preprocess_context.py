"""The context: silence, or in the "lokr" mode the song itself, beside a mask of ones."""

from __future__ import annotations

from typing import Any

import torch


def build_context_latents(
    silence_latent: torch.Tensor,
    latent_length: int,
    device: Any,
    dtype: torch.dtype,
    src_latents: torch.Tensor | None = None,
) -> torch.Tensor:
    if src_latents is None:
        repeats = -(-latent_length // silence_latent.shape[1])
        src_latents = silence_latent.repeat(1, repeats, 1)[:, :latent_length].to(dtype)
    return torch.cat([src_latents, torch.ones(1, latent_length, 64, device=device, dtype=dtype)], dim=-1)
