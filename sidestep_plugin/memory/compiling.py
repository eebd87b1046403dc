"""Compiles the decoder's blocks with ``torch.compile`` while an adapter is trained (``--compile``).

In place, so that no name changes. What looks at the model in between computes uncompiled, as in
:func:`..engine.decoders.undisturbed`: the compiler would take account of what it sees there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import click

from ..errors import Refusal
from ..hookspecs import hookimpl
from ..options import option
from ..run import Run
from ..text import counted

if TYPE_CHECKING:
    import torch

BACKEND: Final = "inductor"
"""The compiler, torch's own."""

_FACTS: Final = "sidestep.compiled"


@hookimpl
def acestep_options() -> list[click.Option]:
    return [option("--compile", "Compile the decoder's blocks (torch.compile; other rounding).")]


@hookimpl
def acestep_run_started(run: Run) -> None:
    if not run.options["compile"]:
        return
    if not run.with_lightning or run.tensor_dir is None:
        raise Refusal(
            "--compile needs Lightning, with which ACE-Step's trainer says when its model is ready. Install it "
            "(pip install lightning), or leave the option out."
        )
    facts = run.state[_FACTS] = {"compiled": True}  # from the start, as resuming compares the facts
    run.facts.append(lambda: facts)


@hookimpl
def engine_model_ready(run: Run, decoder: torch.nn.Module) -> list[str] | None:
    if not run.options["compile"]:
        return None
    blocks = list(_blocks(decoder))
    if not blocks:
        raise Refusal("--compile: this decoder has no list of blocks named layers. Leave it out.")

    facts = run.state[_FACTS]

    def give_up(error: Exception) -> None:
        """Compute as before, and say so once: a failure comes before the block has drawn a random number."""
        _undo(blocks)
        if facts:
            facts.clear()
            run.engine.announce(
                f"Warning: --compile has no effect, torch.compile failed ({_reason(error)}). The training goes on "
                "without it."
            )

    run.engine.at_end(partial(_undo, blocks))
    for block in blocks:
        try:
            _compile(block, give_up)
        except RuntimeError as error:  # torch.compile itself says that it does not work here
            give_up(error)
            break
    return [
        f"Compile: {counted(len(blocks), 'block')} in the first steps, which take longer (rounds differently: not the "
        "same result)"
    ]


def _blocks(decoder: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The decoder's transformer blocks: the entries of its list ``layers``."""
    import torch

    for name, module in decoder.named_modules():
        if isinstance(module, torch.nn.ModuleList) and name.rpartition(".")[2] == "layers":
            yield from module


def _compile(module: torch.nn.Module, give_up: Callable[[Exception], None]) -> None:
    """Let a module be compiled when it is first called; it is called uncompiled from the first failure on."""
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
