"""Groups of commands: one that imports a command only when it is used, one with a default command."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click

from . import terminal
from .interrupts import ended_by_signals

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


class LazyGroup(click.Group):
    """A group that knows its commands by name and one line of help, and imports the one that is used.

    Each command lives in the module of its name beside this one, under its own name.
    """

    def __init__(self, *args: Any, lazy: Mapping[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self.lazy, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.lazy:
            return super().get_command(ctx, cmd_name)
        command: click.Command = getattr(import_module(f"{__package__}.{cmd_name}"), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(self.lazy.items()))


class DefaultGroup(LazyGroup):
    """A group whose default command gets every command line that names no command.

    On a terminal, a command line without any words gets ``bare`` instead of the help.
    """

    def __init__(self, *args: Any, default: str, bare: tuple[str, ...] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.default = default
        self.bare = bare

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and terminal.on_a_terminal() and not ctx.resilient_parsing:
            args = list(self.bare)
        group_options = {option for param in self.get_params(ctx) for option in param.opts}
        if args and args[0] not in self.lazy and args[0] not in group_options and args[0].startswith("-"):
            args.insert(0, self.default)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with ended_by_signals(ctx):
            try:
                return super().invoke(ctx)
            except click.UsageError as error:
                raise terminal.ErrorOfUsage(error) from None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib

            from .commands import with_hint

            if near := difflib.get_close_matches(args[0], self.lazy, n=1):
                error = click.UsageError(f"{error.message.rstrip('.')}. Did you mean {near[0]}?", error.ctx)
            raise with_hint(error, args) from None

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Commands, and the options of the default command, which may be left out."""
        found = super().shell_complete(ctx, incomplete)
        default = self.get_command(ctx, self.default)
        known = {item.value for item in found}
        if incomplete.startswith("-") and default is not None:
            found += [item for item in default.shell_complete(ctx, incomplete) if item.value not in known]
        return found
