"""Trains at uniform timesteps, whatever the model was trained with: every noise level as often as any other."""

import torch

from sidestep_plugin import hookimpl


@hookimpl
def acestep_run_started():
    return ["Timesteps: uniform over [0, 1)"]


@hookimpl
def acestep_sample_timesteps(batch_size, device, dtype):
    return torch.rand((batch_size,), device=device, dtype=dtype)
