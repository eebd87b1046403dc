"""The step: tells plugins which one is running, lets them replace the batch before it and look at it afterwards."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ...errors import PluginError, Refusal, UpstreamMismatch
from ...run import AdapterType, Step
from ..answers import check_replaced, described, writes
from ..current import running_step
from ..seams import SAMPLER

if TYPE_CHECKING:
    import torch

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
        try:
            run = host.run_of_step(module, kind)
            recorded = not (args or kwargs) or (
                signature.bind(module, batch, *args, **kwargs).arguments.get("record_loss", True)
            )
            training = bool(recorded) and torch.is_grad_enabled()
            journal = host.journals.get(run)
            if journal is not None and (loss := journal.recorded(run, training)) is not None:
                return loss
            step = Step(run, module, training, torch.device(module.device), module.dtype)
            if prepares:
                batch = _prepared(host, step, batch)
            run.steps += training
            token = running_step.set(step)
            try:
                # Reading values waits for a GPU, so what the decoder was given is looked at in the first step only.
                look: AbstractContextManager[list[torch.Tensor]]
                look = _watched(module) if samples and run.first_step else nullcontext([])
                with look as given:
                    step.loss = original(module, batch, *args, **kwargs)
            finally:
                running_step.reset(token)
            if samples and not step.sampler_called:
                raise _unused(module, f"ended without calling {SAMPLER}")
            if samples and step.t is not None and any(not _same_times(step.t, t) for t in given):
                raise _unused(module, f"gave its decoder other timesteps than {SAMPLER} returned")
            if journal is not None:
                journal.record(step.loss, training)
            if finishes:
                host.registry.call("acestep_step_finished", step=step)
        except Refusal as refusal:
            host.refusal = refusal
            raise
        return step.loss

    return training_step


def _prepared(host: Host, step: Step, batch: Mapping[str, Any]) -> dict[str, Any]:
    prepared = dict(batch)
    written = writes(batch)
    for name, caller in host.registry.callers("acestep_prepare_batch"):
        asked = {"step": step, "batch": MappingProxyType(prepared)}
        answers = host.registry.ask(name, caller, "acestep_prepare_batch", asked)
        if written != writes(batch):
            raise PluginError(
                f"Plugin {name!r} wrote into the batch's tensors in acestep_prepare_batch, which belong to "
                "upstream. Return new ones."
            )
        for replaced in answers:
            if not isinstance(replaced, Mapping):
                raise PluginError(
                    f"Plugin {name!r} returned {described(replaced)}, expected a mapping of batch entries, from "
                    "acestep_prepare_batch."
                )
            for key, tensor in replaced.items():
                check_replaced(name, prepared, key, tensor, step.device)
            prepared = {**prepared, **replaced}
    return prepared


@contextmanager
def _watched(module: Any) -> Iterator[list[torch.Tensor]]:
    """Collect the timesteps that a step gives its decoder; none when the decoder is not called by keyword."""
    import torch

    given: list[torch.Tensor] = []

    def note(_: Any, __: Any, arguments: Mapping[str, Any]) -> None:
        if isinstance(arguments.get("timestep"), torch.Tensor):
            given.append(arguments["timestep"].detach())

    decoder = getattr(module.model, "decoder", None)
    if not isinstance(decoder, torch.nn.Module):
        yield given
        return
    hook = decoder.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield given
    finally:
        hook.remove()


def _same_times(sampled: torch.Tensor, given: torch.Tensor) -> bool:
    """Whether these are the same timesteps, up to the rounding to bf16 that some versions of upstream make."""
    return sampled.shape == given.shape and bool(((sampled.float() - given.float()).abs() <= 2**-8).all())


def _unused(module: Any, what: str) -> UpstreamMismatch:
    return UpstreamMismatch(
        f"{type(module).__name__}.training_step {what}: the plugin's timesteps were not used. Stopped before the "
        "optimizer changed anything. Use upstream's main version of ACE-Step."
    )
