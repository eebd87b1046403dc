"""``acestep-train run``: any of upstream's own commands, with plugins attached."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from sidestep_plugin import signals
from sidestep_plugin.errors import UpstreamMismatch

from .commands import PluginCommand
from .training_options import ACESTEP_ROOT, WINS, plugin_option


class RunningCommand(PluginCommand):
    """Prepares like any command with plugins. Errors of the program that it starts are not caught.

    Signals end that program as they would without this one.
    """

    def invoke(self, ctx: click.Context) -> Any:
        start = super().invoke(ctx)
        with signals.given_back():
            return start()


@click.command(cls=RunningCommand, default_plugins=(), context_settings={"allow_interspersed_args": False})
@ACESTEP_ROOT
@plugin_option(None)
@WINS
@click.option("--debug", is_flag=True, help="Show where an error came from.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND ...")
def run(
    acestep_root: Path | None,
    plugins: tuple[str, ...],
    wins: str | None,
    options: dict[str, Any],
    command: tuple[str, ...],
) -> Callable[[], Any]:
    """Run one of ACE-Step's own commands with plugins attached to its trainer. No file is changed.

    COMMAND is a command of ACE-Step (acestep, acestep-api), -m MODULE, or a script. Everything after it is passed on
    to it, and its exit code is returned. The plugins are attached when it imports the trainer; its log says so.

    \b
    Example, in the checkout's folder:
        acestep-train run --plugin sidestep -- acestep --port 7860
    """
    from sidestep_plugin.engine.autoload import Wanted, attach_on_import, carry_over
    from sidestep_plugin.engine.checkout import find_root
    from sidestep_plugin.engine.programs import find_command

    root: Path | None = None
    try:
        root = find_root(acestep_root)
    except UpstreamMismatch:
        if acestep_root is not None:
            raise
    if root is not None and str(root) not in sys.path:
        sys.path.insert(0, str(root))
    start = find_command(command, root)
    wanted = Wanted(plugins, options, wins, on_request=True)
    attach_on_import(wanted)
    if plugins:
        carry_over(wanted)
    return start
