"""``acestep-train patch``: the minimal diff in a checkout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from sidestep_plugin.errors import Refusal

from .commands import Unusable
from .terminal import echo
from .training_options import ACESTEP_ROOT


@click.group()
def patch() -> None:
    """Let ACE-Step's own app and server load plugins by themselves, by five lines in the checkout.

    \b
    Example, in the checkout's folder:
        acestep-train patch apply
        acestep

    The lines do nothing if sidestep-plugin is not installed. $ACESTEP_PLUGINS names the plugins (sidestep if it is
    not set, none if it is empty); $SIDESTEP_CFG_RATIO and so on set their options. To try it without changing a file:
    acestep-train run.
    """


def _in_checkout(action: Callable[[Path], Any], said: Path | None) -> tuple[Any, Path]:
    from sidestep_plugin.engine.checkout import find_root

    try:
        root = find_root(said)
        return action(root), root
    except Refusal as refusal:
        raise Unusable(str(refusal)) from None
    except OSError as error:
        raise Unusable(f"Cannot write {error.filename}: {error.strerror or error}. Nothing was changed.") from None


@patch.command()
@ACESTEP_ROOT
def apply(acestep_root: Path | None) -> None:
    """Add the lines. Does nothing if they are there."""
    from sidestep_plugin.engine import checkout_patch as patching

    changed, root = _in_checkout(patching.apply, acestep_root)
    done = "five lines were added at its top." if changed else "has the lines already."
    echo(f"{root / patching.TARGET}: {done}")
    echo("Start ACE-Step as always; its log says which plugins are attached. To undo: acestep-train patch revert")


@patch.command()
@ACESTEP_ROOT
def revert(acestep_root: Path | None) -> None:
    """Remove the lines and leave the file as it was. Does nothing if they are not there."""
    from sidestep_plugin.engine import checkout_patch as patching

    changed, root = _in_checkout(patching.revert, acestep_root)
    done = "is as it was before the patch." if changed else "has no such lines."
    echo(f"{root / patching.TARGET}: {done}")


@patch.command()
@ACESTEP_ROOT
def status(acestep_root: Path | None) -> None:
    """Show whether the lines are there."""
    from sidestep_plugin.engine import checkout_patch as patching

    state, root = _in_checkout(patching.status, acestep_root)
    todo = "acestep-train patch revert takes it out." if state == "applied" else "acestep-train patch apply puts it in."
    echo(f"{root / patching.TARGET}: the patch is {state}. {todo}")


@patch.command()
def show() -> None:
    """Print the patch, for git apply --unidiff-zero or patch -p1."""
    from sidestep_plugin.engine import checkout_patch as patching

    click.echo(patching.patch_text(), nl=False)
