"""Settings files: options under their own names in flat TOML, read for ``--config`` and written beside adapters."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import click

from sidestep_plugin.errors import Refusal
from sidestep_plugin.text import is_control, sentence

FILE_NAME: Final = "training_options.toml"
"""The file beside every adapter with the options of its training."""

_NOT_IN_A_FILE: Final = frozenset({"config", "help", "queue"})
_LISTS_OF_WORDS: Final = frozenset({"target_modules"})
"""Options whose value on a command line is a list with commas."""


_PATHS: Final = "Put a Windows path in single quotes, 'D:\\songs', or use /: in double quotes, \\ has a meaning."
"""What to do about "D:\\tensors\\new", which in TOML holds a tab and the beginning of a new line."""


@dataclass(frozen=True)
class SettingsFile:
    """What a settings file says.

    Attributes:
        file: where it is; None when no file was named.
        values: as they stand there, by option name with underscores.
    """

    file: Path | None
    values: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def empty(cls) -> SettingsFile:
        """No file."""
        return cls(None)

    @classmethod
    def read(cls, name: str) -> SettingsFile:
        """Read a file. Raises Refusal when it is not there or is not TOML."""
        import tomllib

        from sidestep_plugin.files import at_home, not_a_file

        file = Path(at_home(name))
        if file.exists() and (problem := not_a_file(file)):
            raise Refusal(f"Cannot read {file}: it {problem}. Expected a settings file.")
        text = ""
        try:
            text = file.read_text(encoding="utf-8-sig")
            content = tomllib.loads(text)
        except OSError as error:
            raise Refusal(f"Cannot read {file}: {error.strerror or error}. Expected a settings file.") from None
        except UnicodeDecodeError:
            raise Refusal(
                f"{file} is not UTF-8; Windows PowerShell writes UTF-16. Save it as UTF-8: in Notepad, by Save as, "
                "Encoding."
            ) from None
        except (ValueError, RecursionError) as error:
            if _is_of_a_path(text, error):
                raise Refusal(f"{file} is not TOML: {error}. {_PATHS}") from None
            raise Refusal(f"{file} is not TOML: {error}. Expected lines such as epochs = 500.") from None
        values: dict[str, Any] = {}
        for key, value in content.items():
            if (option := key.replace("-", "_")) in values:
                raise Refusal(f"{file} says {key} twice, with - and with _. Leave one of them out.")
            values[option] = value
        return cls(file, values)

    @property
    def plugins(self) -> list[str]:
        """The plugins that it names. Raises Refusal for something other than names."""
        return self._names("plugin")

    @property
    def wins(self) -> list[str]:
        """The plugin that it lets win, if any. Raises Refusal for something other than a name."""
        return self._names("wins")

    def _names(self, option: str) -> list[str]:
        value = self.values.get(option, [])
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise Refusal(f'{self.file}: {option} = {value!r} names no plugin. Expected text, as in "sidestep".')
        return names

    def checked(self, params: Sequence[click.Parameter], ctx: click.Context) -> dict[str, Any]:
        """Its values by parameter name, each as its option would take it. Raises Refusal."""
        options = {
            str(param.name): param
            for param in params
            if isinstance(param, click.Option) and param.name not in _NOT_IN_A_FILE
        }
        from .commands import owner_of

        for name in self.values:
            if name not in options:
                unknown = f"{self.file}: there is no option {_written(name)}."
                if isinstance(self.values[name], dict):
                    raise Refusal(f"{unknown} Expected options without sections: leave [{name}] out.")
                if (owner := owner_of(name)) is not None and owner not in ctx.meta["plugins"]:
                    raise Refusal(
                        f"{self.file}: {_written(name)} is an option of the plugin {owner}, which takes no part. Leave "
                        "it out, or the plugin none."
                    )
                if near := difflib.get_close_matches(name, options, n=1):
                    raise Refusal(f"{unknown} Did you mean {_written(near[0])}?")
                raise Refusal(f"{unknown} Expected names as in --help.")
        return {name: self._value(options[name], value, ctx) for name, value in self.values.items()}

    def _value(self, option: click.Option, value: Any, ctx: click.Context) -> Any:
        name = str(option.name)
        several = option.multiple or name in _LISTS_OF_WORDS
        entries = value if isinstance(value, list) else [value]
        kinds = bool if option.is_flag else (str, int, float)
        if (isinstance(value, list) and not several) or not all(
            isinstance(entry, kinds) and isinstance(entry, bool) == option.is_flag for entry in entries
        ):
            expected = "true or false" if option.is_flag else "a list of texts" if several else "a text or a number"
            raise Refusal(f"{self.file}: {_written(name)} = {value!r} cannot be used. Expected {expected}.")
        if any(isinstance(entry, str) and any(map(is_control, entry)) for entry in entries):
            raise Refusal(f"{self.file}: {_written(name)} = {value!r} holds characters that cannot be shown. {_PATHS}")
        taken = entries if option.multiple else ",".join(map(str, entries)) if several else value
        try:
            option.type_cast_value(ctx, taken)
        except click.UsageError as error:
            raise Refusal(
                f"{self.file}: {_written(name)} = {value!r} cannot be used. Correct it: {error.message}"
            ) from None
        except (ValueError, TypeError, OverflowError) as error:  # a plugin's own type, or int(inf)
            raise Refusal(
                f"{self.file}: {_written(name)} = {value!r} cannot be used. Correct it: {sentence(error)}"
            ) from None
        return taken


def _is_of_a_path(text: str, error: Exception) -> bool:
    """Whether TOML failed at a line with a backslash."""
    place = re.search(r"at line (\d+)", str(error))
    lines = text.splitlines()
    return place is not None and 0 < int(place[1]) <= len(lines) and "\\" in lines[int(place[1]) - 1]


def write(values: Mapping[str, Any], comments: Sequence[str]) -> str:
    """Flat TOML with comments above, keys as options are written | None values are left out.

    Values are texts, whole numbers, fractions, switches, or lists of these.
    """
    lines = [f"# {_one_line(comment)}" for comment in comments]
    lines += [f"{_written(name)} = {_toml(value)}" for name, value in values.items() if value is not None]
    return "\n".join(lines) + "\n"


def _written(name: str) -> str:
    return name.replace("_", "-")


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)  # inf and nan are written alike in both languages
    if isinstance(value, str):
        # The escapes of JSON are TOML's; JSON leaves one control character as it is.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return "[" + ", ".join(_toml(entry) for entry in value) + "]"


def _one_line(text: str) -> str:
    return "".join(sign if sign.isprintable() else " " for sign in text)
