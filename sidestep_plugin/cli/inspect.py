"""``acestep-train inspect``: what an adapter is, and what to generate with."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from sidestep_plugin.errors import Refusal
from sidestep_plugin.options import Place
from sidestep_plugin.text import shown

from .commands import UNUSABLE, Unusable, echo_json
from .terminal import echo


@click.command()
@click.argument("path", type=Place(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def inspect(path: Path, as_json: bool) -> None:
    """Show what an adapter is, what to generate with, and which facts are missing.

    PATH is a .safetensors file, or the folder of an adapter, a checkpoint or a training. It can be a LoRA or LoKr from
    this plugin, ACE-Step, Side-Step or a trainer with kohya-style headers. No file is changed.

    \b
    Example:
        acestep-train inspect adapters/jazz/final/adapter

    The exit code is 0, or 2 if the adapter cannot be read or has a problem.
    """
    from sidestep_plugin.adapters import report
    from sidestep_plugin.adapters.facts import better_than
    from sidestep_plugin.adapters.inspection import inspect_adapter

    try:
        found = inspect_adapter(path)
    except Refusal as refusal:
        raise Unusable(shown(refusal, 5000)) from None
    except OSError as error:
        raise Unusable(f"Cannot read {path}: {error.strerror or error}.") from None
    if as_json:
        echo_json(report.as_json(found))
    else:
        for line in report.as_text(found):
            echo(line)
        if better := better_than(found.adapter.file.path):
            echo(f"  {'Note:':<11}{shown(better, 5000)}")
        for problem in found.problems:
            echo(f"Problem: {shown(problem, 5000)}", err=True)
    sys.exit(UNUSABLE if found.problems else 0)
