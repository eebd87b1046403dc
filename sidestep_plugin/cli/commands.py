"""Shapes of commands: help in groups, plugins' options, a settings file, and short errors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import click
from click.core import ParameterSource

from sidestep_plugin.errors import Refusal
from sidestep_plugin.signals import INTERRUPTED as INTERRUPTED

FAILED = 1
UNUSABLE = 2

_RANGE: Final = re.compile(
    r"(; )?(?<![\w.-])(-?[\d.e+-]+<=?)?x(<=?|>=?)[\d.e+-]+|(; )?(?<![\w.-])-?[\d.e+-]+<=?x(?![<>=\w])"
)


OURS: Final = "sidestep"
"""The plugin that takes part unless somebody says otherwise."""

NONE: Final = "none"
"""What ``--plugin`` is given to leave :data:`OURS` out."""


def chosen(said: Sequence[str], default: Sequence[str] = (OURS,)) -> tuple[str, ...]:
    """The plugins that take part: the default ones and those that were named; ``none`` leaves the default ones out.

    Whoever names a default plugin decides about the order, too.
    """
    named = tuple(name for name in dict.fromkeys(said) if name != NONE)
    if NONE in said or (default and set(default) <= set(named)):
        return named
    return (*(name for name in default if name not in named), *named)


def check_plugins(said: Sequence[str], what: str) -> tuple[str, ...]:
    """Check the plugins of a command in which none takes part.

    Args:
        said: the values of ``--plugin``, which people have in their fingers or in a script.
        what: what the command does without any plugin, for the note that naming one changes nothing.

    Returns:
        The plugins that would take part. Raises Refusal for one that is not installed.
    """
    from sidestep_plugin.registry import Registry

    from .terminal import say

    plugins = chosen(said)
    Registry.load(plugins)
    if plugins != (OURS,):
        say(f"Note: --plugin changes nothing here: {what}.", err=True)
    return plugins


def as_said(plugins: Sequence[str], *, whole: bool = True) -> list[str]:
    """The values of ``--plugin`` that mean these plugins.

    Args:
        plugins: those that take part, in their order.
        whole: whether to name the default plugin as well, where leaving it out means the same.
    """
    if OURS not in plugins:
        return [NONE, *plugins]
    return list(plugins if whole or plugins[0] != OURS else plugins[1:])


class Unusable(click.ClickException):
    """Wrong usage or unusable input: one message on standard error, exit code 2."""

    exit_code = UNUSABLE

    def show(self, file: Any = None) -> None:
        """Print the message on standard error, as it looks best there."""
        from .terminal import say

        say(f"Error: {self.format_message()}", err=True)


def with_hint(error: click.UsageError, typed: Sequence[str]) -> click.UsageError:
    """An error of a command line, which says so if signs of other shells or of a word processor are in it."""
    if any(word in ("\\", "^", "`") for word in typed):
        hint = "A line goes on after \\ in bash, ` in PowerShell and ^ in cmd. Use the one of your shell, or one line."
    elif dashed := [word for word in typed if word and word[0] in _DASHES[1:]]:
        hint = f"{dashed[0]} begins with another sign than -. Type it again: --{dashed[0].lstrip(_DASHES)}"
    else:
        return error
    return click.UsageError(f"{error.format_message().rstrip('.')}. {hint}", error.ctx)


_DASHES: Final = "-\u2010\u2011\u2012\u2013\u2014\u2015\u2212"


class Command(click.Command):
    """A command whose help has its options in groups, and no ranges of numbers.

    Args:
        groups: names of options by title, in the order of the help. Options that are not in it come last, under
            "Options".
    """

    def __init__(self, *args: Any, groups: Mapping[str, Sequence[str]] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.groups = groups or {}

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        typed = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            raise with_hint(error, typed) from None

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        own = {str(param.name): param for param in super().get_params(ctx) if isinstance(param, click.Option)}
        for title, names in self.groups.items():
            _write_options(ctx, formatter, title, [own.pop(name) for name in names if name in own])
        _write_options(ctx, formatter, "Options", own.values())


class RefusingCommand(Command):
    """A command that unusable input ends with one message and exit code 2; ``--debug`` shows where it came from."""

    def invoke(self, ctx: click.Context) -> Any:
        debug = ctx.meta["debug"] = ctx.params.pop("debug", False)
        try:
            return super().invoke(ctx)
        except Refusal as refusal:
            if debug:
                import traceback

                traceback.print_exc()
            raise Unusable(str(refusal)) from refusal
        except BrokenPipeError:  # whoever read has read enough; click ends without a word
            raise
        except OSError as error:  # a name that is too long, a folder that is a file, a disk that is full
            if debug:
                raise
            raise Unusable(f"{error.strerror or error}: {error.filename or ''}".removesuffix(": ")) from error


class PluginCommand(RefusingCommand):
    """A command with ``--plugin NAME ...``, to which the plugins that take part add their options.

    The command's function gets the plugins' names as ``plugins`` and the values of their options as ``options``.

    A parameter named ``config`` names a settings file, whose values are used for options that the command line leaves
    out.

    Args:
        default_plugins: the plugins that take part unless somebody says otherwise.
        shows: names of the options of :data:`OURS` that the help shows; None for all.
    """

    def __init__(
        self,
        *args: Any,
        default_plugins: tuple[str, ...] = (OURS,),
        shows: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.shows = shows
        self.default_plugins = default_plugins
        self._declared: list[click.Option] = []

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        from sidestep_plugin.registry import Registry

        self._declared = []
        plugins: list[str] = []
        try:
            said = self._settings_file(args)
            plugins = list(self._plugins(args, said))
            ctx.meta["plugins"] = tuple(plugins)
            wins = values_of("--wins", args) or said.wins
            self._declared = Registry.load(plugins, wins[-1] if wins else None).declared_options()
            for option in self._declared:
                if any(set(own.opts) & set(option.opts) or own.name == option.name for own in self.params):
                    raise Refusal(f"A plugin declares {option.opts[0]}, which {ctx.info_name} has already.")
            kept = self._kept(args, said)
            known, params = ctx.default_map or {}, self.get_params(ctx)
            ctx.default_map = {**known, **kept.checked(params, ctx), **said.checked(params, ctx)}
            rest = super().parse_args(ctx, args)
            default_map = ParameterSource.DEFAULT_MAP
            took = {name for name in kept.values if ctx.get_parameter_source(name) is default_map} - {*said.values}
            ctx.meta["resumed_options"] = (self._declared, kept.values, took)
            return rest
        except Refusal as refusal:
            raise Unusable(str(refusal)) from refusal
        except click.NoSuchOption as error:
            owner = owner_of(error.option_name.lstrip("-").replace("-", "_"))
            if owner is None or owner in plugins:
                raise
            mend = "Leave --plugin none out" if self.default_plugins else f"Name that as well: --plugin {owner}"
            hint = f"{error.option_name} is an option of the plugin {owner}, which takes no part. {mend}."
            raise click.UsageError(hint, ctx) from None

    def _plugins(self, args: list[str], said: Any) -> tuple[str, ...]:
        """The plugins that take part: as typed, as in the settings file, or those of the checkpoint. Raises Refusal."""
        if typed := named_plugins(args):
            return chosen(typed, self.default_plugins)
        if "plugin" in said.values:
            return chosen(said.plugins or [NONE], self.default_plugins)
        if resumed := values_of("--resume-from", args) or _texts(said.values.get("resume_from")):
            from .resumed import plugins_to_resume

            output = values_of("--output-dir", args) or _texts(said.values.get("output_dir"))
            if (kept := plugins_to_resume(resumed[-1], output[-1] if output else None)) is not None:
                return kept
        return self.default_plugins

    def _kept(self, args: list[str], said: Any) -> Any:
        """What the checkpoint to resume from says about the plugins' options. Raises Refusal."""
        from .settings_file import SettingsFile

        if not (resumed := values_of("--resume-from", args) or _texts(said.values.get("resume_from"))):
            return SettingsFile.empty()
        from .resumed import options_to_resume

        output = values_of("--output-dir", args) or _texts(said.values.get("output_dir"))
        return options_to_resume(resumed[-1], output[-1] if output else None, self._declared)

    def _settings_file(self, args: list[str]) -> Any:
        """The settings file that was named, an empty one when none was. Raises Refusal."""
        from .settings_file import SettingsFile

        files = values_of("--config", args) if any(param.name == "config" for param in self.params) else []
        return SettingsFile.read(files[-1]) if files else SettingsFile.empty()

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        params = super().get_params(ctx)
        return params + [option for option in self._declared if option not in params]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        if self._declared:
            _write_options(ctx, formatter, self._title(ctx), self._shown())
            return
        from sidestep_plugin.registry import installed_plugins

        if names := [plugin.name for plugin in installed_plugins()]:
            with formatter.section("Options of plugins"):
                formatter.write_dl([(f"--plugin {name} --help", f"shows those of {name}") for name in names])

    def _shown(self) -> Sequence[click.Option]:
        if self.shows is None:
            return self._declared
        from sidestep_plugin.registry import Registry

        ours = {option.name for option in Registry.load((OURS,)).declared_options()}
        return [option for option in self._declared if option.name not in ours or option.name in self.shows]

    def _title(self, ctx: click.Context) -> str:
        names = ctx.meta["plugins"]
        return f"Options of the plugin{'s' if len(names) > 1 else ''} {', '.join(names)}"

    def invoke(self, ctx: click.Context) -> Any:
        ctx.params.pop("config", None)
        ctx.params.pop("plugin")
        ctx.params["plugins"] = ctx.meta["plugins"]
        ctx.params["options"] = {str(option.name): ctx.params.pop(str(option.name)) for option in self._declared}
        return super().invoke(ctx)


def owner_of(option: str) -> str | None:
    """The plugin of this project that has an option of that name. Plugins of others are not loaded for a hint."""
    from sidestep_plugin.registry import Registry

    try:
        declared = Registry.load((OURS,)).declared_options()
    except Refusal:  # it is not installed, or is broken; whatever needs it says so
        return None
    return OURS if any(one.name == option for one in declared) else None


def _write_options(
    ctx: click.Context, formatter: click.HelpFormatter, title: str, options: Iterable[click.Option]
) -> None:
    records = [record for option in options if (record := option.get_help_record(ctx)) is not None]
    if records:
        with formatter.section(title):
            formatter.write_dl([(left, without_range(right)) for left, right in records])


def without_range(text: str) -> str:
    """An option's help without click's range of numbers, as in ``[x>=1]``: the error says it to whoever leaves it."""
    head, bracket, extra = text.rpartition("  [")
    if not bracket:
        return text
    kept = _RANGE.sub("", extra.removesuffix("]")).removeprefix("; ").strip()
    return f"{head}  [{kept}]" if kept else head


def _texts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else []


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
    """Print a value as JSON, in ASCII so that any console and pipe can carry it. NaN and infinity become null."""
    import json

    from sidestep_plugin.files import without_nan

    click.echo(json.dumps(without_nan(value), indent=2, allow_nan=False))
