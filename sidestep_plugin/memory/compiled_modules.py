"""Modules of the decoder that are compiled with ``torch.compile`` for one training, in place: no name changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import torch

    from ..run import Run

BACKEND: Final = "inductor"
"""The compiler, torch's own."""


def compile_modules(run: Run, modules: Sequence[torch.nn.Module], not_compiled: Callable[[str], None]) -> None:
    """Let modules be compiled when they are first called, until the training ends.

    Where compiling fails, for example without a C compiler, all of them compute as before. A failure while a module is
    compiled comes before it has computed anything, so no random number is lost.

    Args:
        run: the training.
        modules: what to compile.
        not_compiled: called once with the reason where compiling fails.
    """
    failed: list[str] = []

    def give_up(error: Exception) -> None:
        _undo(modules)
        if not failed:
            failed.append(_reason(error))
            not_compiled(failed[0])

    run.engine.at_end(partial(_undo, modules))
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


def _undo(modules: Sequence[torch.nn.Module]) -> None:
    for module in modules:
        module._compiled_call_impl = None


def _reason(error: Exception) -> str:
    """The first line of the error that made the compiler fail."""
    while isinstance(inner := getattr(error, "inner_exception", error.__cause__), Exception):
        error = inner
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200].rstrip(": .")
