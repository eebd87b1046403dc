"""Samples the training timesteps that the model's variant is trained with.

base, sft (and turbo when asked for "continuous"): exactly the models' own ``sample_t_r`` with ``use_meanflow=False``:
the maximum of two logit-normal draws, in that order, from torch's default generator. turbo: uniform over its 8
inference steps; at shift 3 that is what upstream's sampler does, so upstream itself answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sidestep_plugin import hookimpl
from sidestep_plugin.run import Run, Step
from sidestep_plugin.timesteps.schedule import logit_normal
from sidestep_plugin.timesteps.treatment import treatment_of

if TYPE_CHECKING:
    import torch


@hookimpl
def acestep_sample_timesteps(
    step: Step, batch_size: int, device: torch.device, dtype: torch.dtype
) -> torch.Tensor | None:
    treatment = treatment_of(step.run)
    if treatment.is_upstreams_own:
        return None
    import torch

    if treatment.mu is None or treatment.sigma is None:
        table = _table(step.run, treatment.schedule, device, dtype)
        return table.index_select(0, torch.randint(0, len(table), (batch_size,), device=device))
    first = logit_normal(torch.randn((batch_size,), device=device, dtype=dtype), treatment.mu, treatment.sigma)
    second = logit_normal(torch.randn((batch_size,), device=device, dtype=dtype), treatment.mu, treatment.sigma)
    return torch.maximum(first, second)


def _table(run: Run, schedule: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The schedule as a tensor, made once a run: made anew it would be copied from the host in every step."""
    import torch

    key = ("sidestep.schedule", device, dtype)
    if key not in run.state:
        run.state[key] = torch.tensor(schedule, device=device, dtype=dtype)
    table: torch.Tensor = run.state[key]
    return table
