"""Compiles the decoder's blocks with ``torch.compile`` while an adapter is trained (``--compile``)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import click

from sidestep_plugin import Refusal, hookimpl
from sidestep_plugin.run import MemoryPlan, Run

if TYPE_CHECKING:
    import torch

FACTS: Final = "sidestep.compiled"
"""Where a run keeps the fact that its blocks were compiled."""


def options() -> list[click.Option]:
    return [
        click.Option(
            ["--compile"],
            is_flag=True,
            default=False,
            help="Compile the decoder's blocks (torch.compile; other rounding).",
        )
    ]


@hookimpl(specname="acestep_run_started", trylast=True)
def check_compile(run: Run) -> None:
    if run.options["compile"] and not run.with_lightning:
        raise Refusal("--compile needs Lightning. Install it (pip install lightning), or leave it out.")


@hookimpl(specname="acestep_plan_memory")
def plan_compiling(run: Run, decoder: torch.nn.Module) -> MemoryPlan | None:
    if not run.options["compile"]:
        return None
    blocks = frozenset(_blocks(decoder))
    if not blocks:
        raise Refusal("--compile: this decoder has no list of blocks named layers. Leave it out.")
    run.state[FACTS] = {"compiled": True}

    def not_compiled(reason: str) -> list[str]:
        run.state.pop(FACTS, None)
        return [f"Warning: --compile has no effect, torch.compile failed ({reason}). The training goes on without it."]

    line = (
        f"Compile: {len(blocks)} blocks in the first steps, which take longer (rounds differently: not the same result)"
    )
    return MemoryPlan(compiled=blocks, lines=(line,), not_compiled=not_compiled)


def _blocks(decoder: torch.nn.Module) -> Iterator[str]:
    """Names of the decoder's transformer blocks: the entries of its list ``layers``."""
    import torch

    for name, module in decoder.named_modules():
        if isinstance(module, torch.nn.ModuleList) and name.rpartition(".")[2] == "layers":
            yield from (f"{name}.{number}" for number in range(len(module)))
