"""The engine (Lightning Fabric): made for several GPUs if there are, and for less memory, before upstream sets it up.

At that moment the adapter is injected and nothing has been cast. Plugins say what may stay as it is; what they say is
applied to this one training and undone when it ends.

Its log is the one place that is behind the last optimizer step of an epoch and before its checkpoint in every version:
there the songs that are held out are validated.
"""

from __future__ import annotations

import inspect
from collections.abc import Set
from typing import TYPE_CHECKING, Any

from ...errors import PluginError, Refusal
from ...run import MemoryPlan
from ..answers import checked_lines, described
from ..between_epochs import EPOCH_LOSS, epoch_logged
from ..checkpointing import switch_checkpointing
from ..current import Training, running_training
from ..devices import on_all_devices, seed_apart
from ..loggers import tolerate_failures
from .compiled_modules import compile_modules
from .replaced_modules import replace_modules

if TYPE_CHECKING:
    import torch

    from ..host import Host

_MIXED = {"bf16-mixed": "bfloat16"}
"""Precisions of Fabric in which autocast computes, and the type that it computes in."""


def wrap_engine(host: Host, original: Any) -> Any:
    """A subclass of what stands there, which lets plugins plan the memory of the training that it is made for."""
    signature = inspect.signature(original.__init__)

    class Engine(original):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            call = signature.bind(self, *args, **kwargs)
            training = running_training.get()
            if training is not None and training.run.ranks.several:
                call.arguments.update(on_all_devices(original, call.arguments, training.run.ranks))
            super().__init__(*call.args[1:], **call.kwargs)
            tolerate_failures(host, self)
            self._acestep_plans: list[_Cast] = []
            if training is not None and training.validation is not None:
                training.validation.behind_the_engine = True
            if training is not None:
                precision = call.arguments.get("precision")
                try:
                    self._acestep_plans = _apply_plans(host, training, str(precision))
                except Refusal as refusal:  # upstream reports it as a failure
                    host.refusal = refusal
                    raise

        def log(self, name: str, value: Any, step: int | None = None) -> None:
            super().log(name, value, step=step)
            training = running_training.get()
            if training is None:
                return
            if name == EPOCH_LOSS and training.validation is not None and step is not None:
                training.validation.after_epoch(training.run, step)
            epoch_logged(host, training, name, value, step)

        def launch(self, *args: Any, **kwargs: Any) -> Any:
            launched = super().launch(*args, **kwargs)
            training = running_training.get()
            if training is not None and training.run.ranks.several:
                seed_apart(training.run)
            return launched

        def setup(self, *args: Any, **kwargs: Any) -> Any:
            for cast in self._acestep_plans:
                cast.end()
            return super().setup(*args, **kwargs)

        def backward(self, *args: Any, **kwargs: Any) -> Any:
            # Upstream casts once more after the setup; by the first backward pass all types are final.
            while self._acestep_plans:
                self._acestep_plans.pop(0).report(host)
            return super().backward(*args, **kwargs)

    Engine.__name__, Engine.__qualname__, Engine.__module__ = (
        original.__name__,
        original.__qualname__,
        original.__module__,
    )
    return Engine


def _apply_plans(host: Host, training: Training, precision: str) -> list[_Cast]:
    """Ask the plugins and apply their plans | returns the casts to come, which end when the decoder is set up."""
    import torch

    module = training.trainer.module
    name = _MIXED.get(precision)
    asked = {
        "run": training.run,
        "decoder": module.model.decoder,
        "network": getattr(module, "lycoris_net", None),
        "autocast": None if name is None else getattr(torch, name),
    }
    casts = []
    for plugin, plan in host.registry.call("acestep_plan_memory", **asked):
        if not isinstance(plan, MemoryPlan):
            raise PluginError(
                f"Plugin {plugin!r} returned {described(plan)} from acestep_plan_memory, expected a MemoryPlan."
            )
        for line in plan.lines:
            host.announce(line)
        _bypass(training, asked["network"], plan.bypassed)
        replace_modules(plugin, training, asked["decoder"], plan)
        if plan.after_replacing is not None:
            for line in checked_lines(plugin, "acestep_plan_memory", plan.after_replacing()):
                host.announce(line)
        if plan.checkpointing is not None:
            training.at_end.append(switch_checkpointing(asked["decoder"], plan.checkpointing))
        compile_modules(host, plugin, training, asked["decoder"], plan)
        casts.append(_Cast(asked["decoder"], plan))
        training.at_end.append(casts[-1].end)
    return casts


def _bypass(training: Training, network: Any, names: Set[str]) -> None:
    """Take LyCORIS modules out of the forward pass until the training ends. They stay in the network and its file."""
    for module in getattr(network, "loras", ()):
        if module.lora_name in names:
            module.restore()
            training.at_end.append(module.apply_to)


class _Cast:
    """Upstream's cast of the decoder, ``decoder.to(dtype=torch.float32)``, which leaves the weights of a plan alone.

    Nothing is fp32 in between, so the peak is lower, too.
    """

    def __init__(self, decoder: Any, plan: MemoryPlan) -> None:
        self._decoder, self._plan = decoder, plan
        self._saved: int | None = None
        self._original = decoder.to
        if plan.kept:
            decoder.to = self._to

    def _to(self, *args: Any, **kwargs: Any) -> Any:
        import torch

        dtype = kwargs.get("dtype", args[0] if len(args) == 1 else None)
        if dtype is not torch.float32 or len(args) + len(kwargs) != 1:
            return self._original(*args, **kwargs)
        self.end()
        self._saved = _cast_all_but(self._decoder, self._plan.kept, dtype)
        return self._decoder

    def end(self) -> None:
        """Let the decoder's ``to`` be its own again."""
        if vars(self._decoder).get("to") == self._to:
            del self._decoder.to

    def report(self, host: Host) -> None:
        """Announce what came of it."""
        if self._plan.outcome is not None:
            for line in self._plan.outcome(self._saved):
                host.announce(line)


def _cast_all_but(decoder: torch.nn.Module, kept: Set[str], dtype: torch.dtype) -> int:
    """Cast floating parameters and buffers | returns how many bytes were saved by those that were kept."""
    saved = 0
    for name, parameter in decoder.named_parameters():
        if name in kept and parameter.dtype != dtype:
            saved += parameter.numel() * (dtype.itemsize - parameter.dtype.itemsize)
        elif parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for buffer in decoder.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.to(dtype)
    return saved
