"""Options that plugins add: their types, and their values whether they come from a command line or from Python."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import click

from .errors import Refusal
from .files import at_home
from .text import is_control


def option(name: str, text: str, kind: Any = None, metavar: str | None = None, default: Any = None) -> click.Option:
    """An option by its name and its help: of a click type, with its default shown if the help has none; else a flag."""
    if kind is None:
        return click.Option([name], is_flag=True, default=False, help=text)
    shown = default is not None and "[default" not in text
    return click.Option([name], type=kind, metavar=metavar, default=default, show_default=shown or None, help=text)


class Place(click.Path):
    """The name of a file or folder, with ``~`` for the home folder, which no shell replaces in ``--dir=~/x``.

    An empty name (a shell variable that was not set) is refused: it would mean the current folder.
    """

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str | os.PathLike):
            self.fail(f"{value!r} is not the name of a file or folder. Expected text.", param, ctx)
        if str(value) == "":
            self.fail("The file's or folder's name is empty.", param, ctx)
        if os.name == "nt" and '"' in str(value):  # Windows takes \" for a part of the name
            self.fail(
                f'{value!r} holds a quotation mark. Leave out the \\ before the closing one: "D:\\songs"', param, ctx
            )
        try:
            return super().convert(at_home(os.fspath(value)), param, ctx)
        except Refusal as refusal:
            self.fail(str(refusal), param, ctx)


class FiniteFloat(click.FloatRange):
    """A float range that also refuses NaN and infinity, which compare with nothing."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            if "," in str(value):
                self.fail(f"{value!r} is not a number. Type fractions with a point, as in 0.0001.", param, ctx)
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return float(super().convert(number, param, ctx))


class WholeNumber(click.IntRange):
    """An integer range that refuses 8.7 and True from Python, which int() would quietly make 8 and 1."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
            self.fail(f"{value!r} is not a whole number.", param, ctx)
        try:
            return int(super().convert(value, param, ctx))
        except TypeError:
            self.fail(f"{value!r} is not a whole number.", param, ctx)


class SongsOrShare(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic from click 8.4 on
    """A whole number of songs, or a share of them below 1, as in 2, 0.1 and 10%."""

    name = "songs"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value).strip()
        try:
            number = float(text.removesuffix("%")) / (100.0 if text.endswith("%") else 1.0)
        except ValueError:
            number = -1.0
        whole = number < 10**9 and number.is_integer() and not text.endswith("%")
        if isinstance(value, bool) or not (0.0 <= number < 1.0 or (whole and number > 0.0)):
            self.fail(
                f"{value!r} is not a number of songs. Expected a whole number such as 2, or a share such as 0.1.",
                param,
                ctx,
            )
        return number


class Strengths(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic from click 8.4 on
    """Strengths of an adapter, such as 0.6,0.8,1: numbers above 0 and up to 10, separated by commas, each once."""

    name = "strengths"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            strengths = tuple(float(word) for word in str(value).split(","))
        except ValueError:
            strengths = ()
        if not strengths or not all(0.0 < strength <= 10.0 for strength in strengths):
            self.fail(f"{value!r}: expected numbers above 0 and up to 10, such as 0.6,0.8,1.", param, ctx)
        if len(set(strengths)) < len(strengths):
            self.fail(f"{value!r} has a strength twice. Leave one of them out.", param, ctx)
        return strengths


class Line(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic from click 8.4 on
    """One line of text for people: not empty, without control characters, and something that a file can hold."""

    name = "text"
    longest = 1000

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = value.strip() if isinstance(value, str) else ""
        if not text:
            self.fail("Expected some text.", param, ctx)
        if len(text) > self.longest:
            self.fail(f"Expected at most {self.longest} characters, found {len(text)}.", param, ctx)
        # Halves of characters, which a terminal with another encoding hands over, are among them.
        if any(is_control(character) for character in text):
            self.fail(f"{text!r} holds characters that cannot be shown.", param, ctx)
        return text


def resolve_options(declared: Sequence[click.Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """Check given values by the options' own types and fill in the defaults.

    Args:
        given: values by option name. None means: the default.

    Raises:
        Refusal: a name that no plugin declares, or a value that its type refuses.
    """
    by_name = {option.name: option for option in declared if option.name}
    for name in given:
        if name not in by_name:
            near = difflib.get_close_matches(name, by_name, n=1)
            known = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(sorted(by_name)) or 'none'}."
            raise Refusal(f"No loaded plugin has an option {name!r}. {known}")
    values: dict[str, Any] = {}
    for name, option in by_name.items():
        # As the default of a command line without arguments: converted and checked by click as if it had been typed.
        default = {} if given.get(name) is None else {name: given[name]}
        command = click.Command("options", params=[option], add_help_option=False)
        try:
            values |= command.make_context("options", [], default_map=default).params
        except click.UsageError as error:
            raise Refusal(f"Option {name}: {error.message}") from None
        except (TypeError, ValueError, OverflowError) as error:
            raise Refusal(f"Option {name}: {given[name]!r} cannot be used ({error}).") from None
    return values
