"""Samples every timestep from the noisier half."""

import torch

from sidestep_plugin import hookimpl


@hookimpl
def acestep_sample_timesteps(batch_size, device, dtype):
    return 0.5 + 0.5 * torch.rand((batch_size,), device=device, dtype=dtype)
