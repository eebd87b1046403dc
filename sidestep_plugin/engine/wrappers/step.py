"""The step: plugins may replace the batch before it and look at the result after it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ...errors import PluginError
from ...run import AdapterType, Run, Step, note
from ..answers import check_replaced, counted, described, writes
from ..current import during, running_step
from ..decoder_check import Given, check_decoder_input, unused, watched_decoder
from ..evaluation import evaluating, without_condition
from ..shapes import SAMPLER

if TYPE_CHECKING:
    from ..host import Host


def wrap_step(host: Host, original: Callable[..., Any], kind: AdapterType) -> Callable[..., Any]:
    import torch

    signature = inspect.signature(original)
    prepares, finishes, samples = (
        host.registry.implements(hook)
        for hook in ("acestep_prepare_batch", "acestep_step_finished", "acestep_sample_timesteps")
    )

    @wraps(original)
    def training_step(module: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        with host.refusing():
            run = host.run_of_step(module, kind)
            if evaluating.get() is not None:
                return _evaluated(host, original, run, module, batch, prepares=prepares)
            recorded = not (args or kwargs) or (
                signature.bind(module, batch, *args, **kwargs).arguments.get("record_loss", True)
            )
            training = bool(recorded) and torch.is_grad_enabled()
            journal = host.journals.get(run)
            if journal is not None and (loss := journal.recorded(run, training)) is not None:
                return loss
            device = module.device if isinstance(module.device, torch.device) else torch.device(module.device)
            step = Step(run, module, training, device, module.dtype)
            if prepares:
                batch = _prepared(host, step, batch)
            run.steps += training
            watch = (samples or prepares) and run.first_step
            with during(running_step, step), _watched(module, watch) as calls:
                loss = original(module, batch, *args, **kwargs)
            if samples and not step.sampler_called:
                raise unused(module, f"ended without calling {SAMPLER}")
            if watch:
                check_decoder_input(step, batch, calls, samples=samples)
            if journal is not None:
                loss = journal.record(loss, training)
            if training:
                run.clock.stepped(run.paused)
            if finishes:
                # A copy: nothing that a plugin does to it reaches the training.
                note(step, loss=loss.detach().clone())
                host.registry.call("acestep_step_finished", step=step)
            return loss

    return training_step


def _evaluated(
    host: Host, original: Callable[..., Any], run: Run, module: Any, batch: Mapping[str, Any], *, prepares: bool
) -> Any:
    """A step of a validation: upstream's own, at a given t with given noise. Nothing records or counts it."""
    import torch

    point = evaluating.get()
    assert point is not None
    step = Step(run, module, False, torch.device(module.device), module.dtype)
    prepared = _prepared(host, step, batch) if prepares else dict(batch)
    if not point.condition:
        prepared |= without_condition(step, prepared)
    point.seed_noise(step.device)
    with during(running_step, step), _watched(module, point.check) as calls:
        loss = original(module, prepared)
    if not step.sampler_called:
        raise unused(module, f"ended without calling {SAMPLER}")
    check_decoder_input(step, prepared, calls, samples=True)
    return loss


def _watched(module: Any, watch: bool) -> AbstractContextManager[list[Given]]:
    return watched_decoder(module) if watch else nullcontext([])


def _prepared(host: Host, step: Step, batch: Mapping[str, Any]) -> dict[str, Any]:
    prepared = dict(batch)
    tensors = counted(batch)
    written = writes(tensors)
    hook = "acestep_prepare_batch"
    for name, caller in host.registry.callers(hook):
        answers = host.registry.ask(name, caller, hook, {"step": step, "batch": MappingProxyType(prepared)})
        if written != writes(tensors):
            raise PluginError(
                f"Plugin {name!r} wrote into the batch's tensors in {hook}. They belong to "
                "upstream: return new tensors."
            )
        for replaced in answers:
            if not isinstance(replaced, Mapping):
                raise PluginError(
                    f"Plugin {name!r} returned {described(replaced)}, expected a mapping of batch entries, from {hook}."
                )
            check_replaced(name, prepared, replaced, step.device)
            prepared = {**prepared, **replaced}
    return prepared
