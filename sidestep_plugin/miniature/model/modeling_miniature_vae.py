"""The miniature's VAE: each frame of 40 ms becomes the 64 lowest tones of a cosine transform of its mono sound.

With it sounds below 800 Hz go through encoding and decoding nearly unchanged, without any training.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

_CHANNELS = 64


class MiniatureVAEConfig(PretrainedConfig):
    model_type = "miniature_vae"

    def __init__(self, sampling_rate: int = 48000, hop: int = 1920, **others: Any) -> None:
        self.sampling_rate, self.hop = sampling_rate, hop
        super().__init__(**others)


class MiniatureVAE(PreTrainedModel):  # type: ignore[no-untyped-call]
    """Has `encode(audio).latent_dist.sample()` and `decode(latents).sample`, as diffusers' autoencoders have."""

    config_class = MiniatureVAEConfig
    main_input_name = "audio"

    def __init__(self, config: MiniatureVAEConfig) -> None:
        super().__init__(config)
        self.gain = nn.Parameter(torch.ones(1))
        self.post_init()  # type: ignore[no-untyped-call]

    def _tones(self) -> Tensor:
        """[64, hop], orthonormal: the cosine transform of type II. A tone of full scale is about 1 in its channel."""
        hop = self.config.hop
        times = torch.arange(hop, dtype=torch.float64) + 0.5
        tones = torch.cos(math.pi / hop * torch.arange(_CHANNELS, dtype=torch.float64)[:, None] * times)
        tones[0] /= math.sqrt(2.0)
        return (tones * math.sqrt(2.0 / hop)).to(self.gain)

    def encode(self, audio: Tensor) -> Any:
        """Given [B, 2, N], the distribution of latents [B, 64, N // hop]."""
        hop = self.config.hop
        frames = audio.shape[-1] // hop
        mono = audio.mean(1)[:, : frames * hop].reshape(len(audio), frames, hop)
        mean = (mono @ self._tones().T).transpose(1, 2) * self.gain / 8.0

        def sample() -> Tensor:
            return mean + 0.01 * torch.randn_like(mean)

        return SimpleNamespace(latent_dist=SimpleNamespace(sample=sample, mode=lambda: mean))

    def decode(self, latents: Tensor) -> Any:
        """Given [B, 64, T], the sound [B, 2, T * hop] as `sample`."""
        mono = ((8.0 / self.gain * latents).transpose(1, 2) @ self._tones()).flatten(1)
        return SimpleNamespace(sample=mono[:, None].repeat(1, 2, 1))

    def forward(self, audio: Tensor) -> Any:
        return self.decode(self.encode(audio).latent_dist.mode())
