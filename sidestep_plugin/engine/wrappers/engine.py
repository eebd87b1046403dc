"""The engine (Lightning Fabric): made for several GPUs if there are, and asked where its moments are.

When it is made, the adapter is injected and nothing has been cast: plugins prepare the model then. The loss of an epoch
is logged behind its last optimizer step and before its checkpoint.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Final

from ...adapters.kinds import network_of
from ..current import running_training
from ..devices import on_all_devices, seed_apart
from ..epochs import EPOCH_LOSS, ended
from ..loggers import tolerate_failures

if TYPE_CHECKING:
    from ..host import Host

_MIXED: Final = "bf16-mixed"
"""The precision of Fabric in which autocast computes in bf16."""


def wrap_engine(host: Host, original: Any) -> Any:
    """A subclass of what stands there, which tells plugins what the training that it is made for does."""
    import torch

    signature = inspect.signature(original.__init__)

    class Engine(original):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            call = signature.bind(self, *args, **kwargs)
            training = running_training.get()
            if training is not None and training.run.ranks.several:
                call.arguments.update(on_all_devices(original, call.arguments, training.run.ranks))
            super().__init__(*call.args[1:], **call.kwargs)
            tolerate_failures(host, self)
            self._acestep_types_are_final = training is None
            if training is not None:
                module = training.trainer.module
                mixed = call.arguments.get("precision") == _MIXED
                asked = {"run": training.run, "decoder": module.model.decoder, "network": network_of(module)}
                with host.refusing():
                    host.ask_and_announce("engine_model_ready", **asked, autocast=torch.bfloat16 if mixed else None)

        def log(self, name: str, value: Any, step: int | None = None) -> None:
            super().log(name, value, step=step)
            training = running_training.get()
            if training is not None and name == EPOCH_LOSS:
                ended(host, training)

        def launch(self, *args: Any, **kwargs: Any) -> Any:
            launched = super().launch(*args, **kwargs)
            training = running_training.get()
            if training is not None and training.run.ranks.several:
                seed_apart(training.run)
            return launched

        def backward(self, *args: Any, **kwargs: Any) -> Any:
            # Upstream casts once more after the setup; by the first backward pass all types are final.
            training = running_training.get()
            if not self._acestep_types_are_final and training is not None:
                self._acestep_types_are_final = True
                with host.refusing():
                    host.ask_and_announce("engine_types_final", run=training.run)
            return super().backward(*args, **kwargs)

    Engine.__name__, Engine.__qualname__, Engine.__module__ = (
        original.__name__,
        original.__qualname__,
        original.__module__,
    )
    return Engine
