"""Parts for tests of previews: a tiny VAE with random weights, and adapters that are not zero."""

from __future__ import annotations

import warnings

import torch

HOP = 1920
"""Samples of a frame: 48,000 Hz at 25 frames per second."""


def write_tiny_vae(folder, **changes):
    """Save a random AutoencoderOobleck with the shapes of ACE-Step's and next to no weights | returns its folder."""
    settings = {
        "encoder_hidden_size": 4,
        "downsampling_ratios": [2, 4, 4, 6, 10],
        "channel_multiples": [1, 1, 1, 1, 1],
        "decoder_channels": 4,
        "decoder_input_channels": 64,
        "audio_channels": 2,
        "sampling_rate": 48000,
    }
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        from diffusers import AutoencoderOobleck

        torch.manual_seed(3)
        AutoencoderOobleck(**(settings | changes)).save_pretrained(folder)
    return folder


def moved_a_little(decoder):
    """Make an adapter that is exactly zero do something | returns how many tensors were changed."""
    changed = 0
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for weight in decoder.parameters():
            if weight.requires_grad and not bool(weight.any()):
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator).to(weight))
                changed += 1
    return changed
