"""Parts for tests of previews: a tiny VAE with random weights, and adapters that are not zero."""

from __future__ import annotations

import warnings

import torch

from sidestep_plugin.previews.making import write_row
from sidestep_plugin.previews.table import Table
from sidestep_plugin.run import Clip

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


NAMES = ["plain", 'a "quoted" <song> & ümlaut', "../../outside"]
ABOUT = {
    "model_name": "acestep-v15-<base>",
    "songs": [{"name": name, "seconds": 0.2} for name in NAMES],
    "settings": {"shift": 1.0, "steps": 50, "guidance": 7.0, "seed": 42},
}


def filled(folder, rate=8000):
    """A folder with the clips of four states of an adapter, 0.2 s of noise each. Returns their table."""
    table = Table(dict(ABOUT))
    generator = torch.Generator().manual_seed(0)
    for epoch, loss in ((0, None), (1, 1.25), (10, 0.5), (2, 1.0)):
        clips = [Clip(torch.rand(2, rate // 5, generator=generator) - 0.5, rate) for _ in NAMES]
        write_row(folder, table, "base model" if epoch == 0 else f"epoch {epoch}", epoch, loss, clips)
    return table
