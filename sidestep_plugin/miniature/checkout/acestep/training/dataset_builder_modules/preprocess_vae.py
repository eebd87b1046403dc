"""Latents of a song, in windows of 15 seconds."""

from __future__ import annotations

from typing import Any

import torch

_WINDOW = 15 * 48000


def tiled_vae_encode(vae: Any, audio: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return [B, T, 64] for audio [B, 2, N]."""
    with torch.inference_mode():
        parts = [
            vae.encode(part).latent_dist.sample() for part in audio.split(_WINDOW, dim=-1) if part.shape[-1] >= 1920
        ]
    return torch.cat(parts, dim=-1).transpose(1, 2).to(dtype)
