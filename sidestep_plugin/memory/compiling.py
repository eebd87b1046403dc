"""Compiles the decoder's blocks with ``torch.compile`` while an adapter is trained (``--compile``)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from ..errors import Refusal
from ..hookspecs import hookimpl
from ..run import Run
from .compiled_modules import compile_modules

if TYPE_CHECKING:
    import torch


@hookimpl
def acestep_options() -> list[click.Option]:
    return [
        click.Option(
            ["--compile"],
            is_flag=True,
            default=False,
            help="Compile the decoder's blocks (torch.compile; other rounding).",
        )
    ]


@hookimpl
def acestep_run_started(run: Run) -> None:
    if run.options["compile"] and not run.with_lightning:
        raise Refusal("--compile needs Lightning. Install it (pip install lightning), or leave it out.")


@hookimpl
def engine_model_ready(run: Run, decoder: torch.nn.Module) -> list[str] | None:
    if not run.options["compile"]:
        return None
    blocks = list(_blocks(decoder))
    if not blocks:
        raise Refusal("--compile: this decoder has no list of blocks named layers. Leave it out.")
    facts = {"compiled": True}
    run.facts.append(lambda: facts)

    def not_compiled(reason: str) -> None:
        facts.clear()
        run.engine.announce(
            f"Warning: --compile has no effect, torch.compile failed ({reason}). The training goes on without it."
        )

    compile_modules(run, blocks, not_compiled)
    return [
        f"Compile: {len(blocks)} blocks in the first steps, which take longer (rounds differently: not the same result)"
    ]


def _blocks(decoder: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The decoder's transformer blocks: the entries of its list ``layers``."""
    import torch

    for name, module in decoder.named_modules():
        if isinstance(module, torch.nn.ModuleList) and name.rpartition(".")[2] == "layers":
            yield from module
