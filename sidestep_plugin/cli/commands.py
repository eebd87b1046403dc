"""Shapes of commands: a group with a default command; commands with plugins' options and short errors."""

from __future__ import annotations

import json
from typing import Any

import click

from sidestep_plugin.errors import Refusal

FAILED = 1
UNUSABLE = 2
INTERRUPTED = 130


class Unusable(click.ClickException):
    """Wrong usage or unusable input: one message on standard error, exit code 2."""

    exit_code = UNUSABLE


class Place(click.Path):
    """The name of a file or folder. An empty one (a shell variable that was not set) would mean the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if str(value) == "":
            self.fail("The file's or folder's name is empty.", param, ctx)
        return super().convert(value, param, ctx)


class DefaultGroup(click.Group):
    """A group that hands everything which does not name a command to its default command."""

    def __init__(self, *args: Any, default: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.default = default

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        group_options = {option for param in self.get_params(ctx) for option in param.opts}
        if args and args[0] not in self.commands and args[0] not in group_options and args[0].startswith("-"):
            args.insert(0, self.default)
        return super().parse_args(ctx, args)


class PluginCommand(click.Command):
    """A command with ``--plugin NAME ...``, to which the named plugins add their options.

    Unusable input ends it with one message and exit code 2; ``--debug`` shows where it came from. The command's
    function gets the plugins' names as ``plugins`` and the values of their options as ``options``.
    """

    def __init__(self, *args: Any, default_plugins: tuple[str, ...] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.default_plugins = default_plugins
        self._declared: list[click.Option] = []

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        from sidestep_plugin.registry import Registry

        self._declared = []
        try:
            wins = values_of("--wins", args)
            registry = Registry.load(named_plugins(args) or self.default_plugins, wins[-1] if wins else None)
            self._declared = registry.declared_options()
            for option in self._declared:
                if any(set(own.opts) & set(option.opts) or own.name == option.name for own in self.params):
                    raise Refusal(f"A plugin declares {option.opts[0]}, which {ctx.info_name} has already.")
            return super().parse_args(ctx, args)
        except Refusal as refusal:
            raise Unusable(str(refusal)) from refusal
        except click.NoSuchOption as error:
            if named_plugins(args) or self.default_plugins:
                raise
            hint = f"{error.format_message()} It may be a plugin's: name it, as in --plugin sidestep."
            raise click.UsageError(hint, ctx) from None

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        params = super().get_params(ctx)
        return params + [option for option in self._declared if option not in params]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from sidestep_plugin.registry import installed_plugins

        declared = self._declared
        own = [param for param in self.get_params(ctx) if isinstance(param, click.Option) and param not in declared]
        for title, params in (("Options", own), ("Options of the named plugins", declared)):
            records = [record for param in params if (record := param.get_help_record(ctx)) is not None]
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)
        if not declared and (names := [plugin.name for plugin in installed_plugins()]):
            with formatter.section("Options of plugins"):
                formatter.write_dl([(f"--plugin {name} --help", f"shows those of {name}") for name in names])

    def invoke(self, ctx: click.Context) -> Any:
        debug = ctx.meta["debug"] = ctx.params.pop("debug", False)
        ctx.params["plugins"] = ctx.params.pop("plugin") or self.default_plugins
        ctx.params["options"] = {str(option.name): ctx.params.pop(str(option.name)) for option in self._declared}
        try:
            return super().invoke(ctx)
        except Refusal as refusal:
            if debug:
                import traceback

                traceback.print_exc()
            raise Unusable(str(refusal)) from refusal
        except OSError as error:  # a name that is too long, a folder that is a file, a disk that is full
            if debug:
                raise
            raise Unusable(f"{error.strerror or error}: {error.filename or ''}".removesuffix(": ")) from error
        except KeyboardInterrupt:
            click.echo("Interrupted before the training began; nothing was saved.", err=True)
            ctx.exit(INTERRUPTED)


def named_plugins(args: list[str]) -> list[str]:
    """Values of ``--plugin`` in a command line, as click would read them."""
    return values_of("--plugin", args)


def values_of(option: str, args: list[str]) -> list[str]:
    """Values of an option in a command line, before click has read it."""
    values = []
    for position, argument in enumerate(args):
        if argument == "--":
            break
        if argument == option and position + 1 < len(args):
            values.append(args[position + 1])
        elif argument.startswith(f"{option}="):
            values.append(argument.partition("=")[2])
    return values


def echo_json(value: Any) -> None:
    """Print a value as JSON, in ASCII so that any console and pipe can carry it."""
    click.echo(json.dumps(value, indent=2, allow_nan=False))
