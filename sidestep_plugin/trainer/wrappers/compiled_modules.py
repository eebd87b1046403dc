"""Modules of the decoder that are compiled with ``torch.compile`` for one training, in place: no name changes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from ...errors import PluginError
from ..answers import checked_lines
from ..current import Training

if TYPE_CHECKING:
    import torch

    from ...run import MemoryPlan
    from ..host import Host

BACKEND: Final = "inductor"
"""The compiler, torch's own."""


def compile_modules(host: Host, plugin: str, training: Training, decoder: torch.nn.Module, plan: MemoryPlan) -> None:
    """Let a plan's modules be compiled when they are first called, until the training ends.

    Where compiling fails, for example without a C compiler, all of them compute as before and the plugin is told why,
    once. A failure while a module is compiled comes before it has computed anything, so no random number is lost.

    Raises:
        PluginError: a name that is no module of the decoder.
    """
    modules = []
    for name in sorted(plan.compiled):
        try:
            modules.append(decoder.get_submodule(name))
        except AttributeError:
            raise PluginError(
                f"Plugin {plugin!r} compiles {name!r} in acestep_plan_memory, which the decoder does not have. "
                "Use names from decoder.named_modules()."
            ) from None
    failed: list[str] = []

    def give_up(error: Exception) -> None:
        _undo(modules)
        if not failed:
            failed.append(_reason(error))
            lines = [] if plan.not_compiled is None else plan.not_compiled(failed[0])
            for line in checked_lines(plugin, "acestep_plan_memory", lines):
                host.announce(line)

    training.at_end.append(partial(_undo, modules))
    for module in modules:
        try:
            _compile(module, give_up)
        except RuntimeError as error:  # torch.compile itself says that it does not work here
            give_up(error)
            return


def _compile(module: torch.nn.Module, give_up: Callable[[Exception], None]) -> None:
    """Compile one module, and call it uncompiled from the first failure of the compiler on."""
    from torch._dynamo.exc import TorchDynamoException

    # Dropout draws the random numbers that it draws without compiling.
    options = {"fallback_random": True} if BACKEND == "inductor" else None
    module.compile(backend=BACKEND, options=options)
    compiled: Any = module._compiled_call_impl

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return compiled(*args, **kwargs)
        except TorchDynamoException as error:
            give_up(error)
            return module(*args, **kwargs)

    module._compiled_call_impl = call


def _undo(modules: list[torch.nn.Module]) -> None:
    for module in modules:
        module._compiled_call_impl = None


def _reason(error: Exception) -> str:
    """The first line of the error that made the compiler fail."""
    while isinstance(inner := getattr(error, "inner_exception", error.__cause__), Exception):
        error = inner
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200].rstrip(": .")
