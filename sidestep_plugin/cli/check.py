"""``acestep-train check``: does this checkout fit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sidestep_plugin.adapters.kinds import NAMES
from sidestep_plugin.errors import Refusal

from .commands import FAILED, Command, Unusable, echo_json
from .terminal import echo, say_what_takes_long
from .training_options import ACESTEP_ROOT, CHECKPOINT_DIR

if TYPE_CHECKING:
    from sidestep_plugin.run import AdapterType


@click.command(cls=Command)
@ACESTEP_ROOT
@CHECKPOINT_DIR
@click.option(
    "--adapter-type",
    type=click.Choice(NAMES),
    help="Check this kind of adapter only.  [default: all that this ACE-Step trains]",
)
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@click.option("--debug", is_flag=True, help="Show all logs.")
def check(
    acestep_root: Path | None, checkpoint_dir: Path | None, adapter_type: str | None, as_json: bool, debug: bool
) -> None:
    """Check whether a checkout's trainer fits, without training anything.

    It imports the trainer and looks for every name that the plugins attach to: whether it is there, and whether the
    trainer uses it. The exit code is 0 if every kind of adapter that is checked can be
    trained and a model is there, and 1 if not.
    """
    import dataclasses
    import logging

    from sidestep_plugin.engine.checkout import find_root
    from sidestep_plugin.engine.compatibility import examine_checkout
    from sidestep_plugin.engine.models import checkpoint_folder
    from sidestep_plugin.engine.shapes import MODULE_CLASS

    from . import quiet
    from .torch_here import require_torch

    if not debug:
        logging.disable(logging.INFO)
        quiet.quiet_third_parties()
        quiet.quiet_upstream()
    try:
        root = find_root(acestep_root)
        if not as_json:
            echo(f"ACE-Step: {root}")
        require_torch()
    except Refusal as refusal:
        raise Unusable(str(refusal)) from None
    say_what_takes_long("Importing ACE-Step's trainer ...")
    kinds: list[AdapterType] = [kind for kind in MODULE_CLASS if kind == adapter_type]
    fitness = examine_checkout(root, checkpoint_folder(checkpoint_dir, root), kinds)
    if as_json:
        echo_json(dataclasses.asdict(fitness))
        sys.exit(0 if fitness.fits else FAILED)
    echo("Versions: " + ", ".join(f"{name} {version}" for name, version in fitness.versions.items()))
    for kind in dict.fromkeys(seam.adapter_type for seam in fitness.seams):
        echo(f"Compatibility check for {kind}:")
        for seam in fitness.seams:
            if seam.adapter_type == kind:
                reason = f": {seam.reason}" if seam.reason else ""
                if seam.optional and seam.status != "found":
                    reason += f" (without it: no {seam.without})" if seam.without else " (nothing is lost)"
                echo(f"    {seam.status:<12}{seam.name}{reason}")
    echo(f"Models in {fitness.checkpoint_dir}:" + ("" if fitness.models else " none"))
    for model in fitness.models:
        echo(f"    {model.name}: {model.member or 'unknown'} ({model.evidence})")
    echo("Plugins:" + ("" if fitness.plugins else " none"))
    for plugin in fitness.plugins:
        echo(f"    {plugin.name} ({plugin.distribution} {plugin.version}): {plugin.error or 'loads'}")
    echo(f"Verdict: {fitness.verdict}")
    sys.exit(0 if fitness.fits else FAILED)
