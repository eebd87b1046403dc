"""The sampler: calls the plugin that samples timesteps.

Upstream does not pass the model, so the wrapper takes it from the running step. It supports every signature that
upstream has had.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

from ...run import note
from ..answers import check_timesteps
from ..current import running_step
from ..evaluation import evaluating
from ..shapes import sampler_style

if TYPE_CHECKING:
    from ...run import Step
    from ..host import Host


def wrap_sampler(host: Host, original: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    takes_table = sampler_style(original) == "timesteps_tensor"
    signature = inspect.signature(original)
    asked_plugins = host.registry.callers("acestep_sample_timesteps")  # one, or none

    @wraps(original)
    def sample_discrete_timestep(*args: Any, **kwargs: Any) -> Any:
        step = running_step.get()
        if step is None:  # called from outside a training step: leave it alone
            return original(*args, **kwargs)
        note(step, sampler_called=True)
        point = evaluating.get()
        if not asked_plugins and point is None:
            return _noted(step, original(*args, **kwargs))
        values = list(signature.bind(*args, **kwargs).arguments.values()) if kwargs else args
        batch_size = int(values[0])
        if takes_table:
            device, dtype = values[1].device, values[1].dtype
        else:
            device, dtype = torch.device(values[1]), values[2]
        if point is not None:
            fixed = torch.full((batch_size,), point.t, device=device, dtype=dtype)
            note(step, t=fixed)
            return fixed, fixed
        ((plugin, caller),) = asked_plugins
        asked = {"step": step, "batch_size": batch_size, "device": device, "dtype": dtype}
        for t in host.registry.ask(plugin, caller, "acestep_sample_timesteps", asked):
            check_timesteps(plugin, t, batch_size, device, dtype, first=step.run.first_step)
            note(step, t=t, sampled_by=step.run.sampled_by)
            return t, t
        return _noted(step, original(*args, **kwargs))

    return sample_discrete_timestep


def _noted(step: Step, sampled: Any) -> Any:
    """Keep what upstream's own sampler returned in the step."""
    t = sampled[0] if isinstance(sampled, tuple) and sampled else sampled
    note(step, t=t if hasattr(t, "shape") else None)
    return sampled
