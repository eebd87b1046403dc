"""Which plugins and settings a checkpoint was trained with: a training that is resumed goes on with the same."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import click

from sidestep_plugin.errors import Refusal
from sidestep_plugin.files import at_home

from .commands import NONE, OURS, as_said, chosen, owner_of
from .settings_file import FILE_NAME, SettingsFile


def plugins_of(checkpoint: Path) -> tuple[str, ...] | None:
    """The plugins that a checkpoint was trained with; None if ACE-Step has saved it without one.

    Raises:
        Refusal: the file beside it that names them cannot be read.
    """
    from sidestep_plugin.resuming.checkpoints import STATE_FILE

    for folder in (checkpoint, checkpoint / "adapter"):
        if (folder / FILE_NAME).is_file():
            return chosen(SettingsFile.read(str(folder / FILE_NAME)).plugins or [NONE])
    return (OURS,) if (checkpoint / STATE_FILE).is_file() else None


def plugins_to_resume(said: str, output: str | None) -> tuple[str, ...] | None:
    """The plugins with which a training is resumed when nobody names any.

    Args:
        said: the value of ``--resume-from``.
        output: that of ``--output-dir``.

    Returns:
        Names; None where no checkpoint is found, which is refused later.

    Raises:
        Refusal: ACE-Step has saved the checkpoint without a plugin, so that there are two ways to go on.
    """
    if (folder := _checkpoint(said, output)) is None:
        return None
    if (plugins := plugins_of(folder)) is None:
        raise Refusal(
            f"{folder} was saved by ACE-Step without a plugin. Say how to go on: --plugin sidestep restores the "
            "adapter's weights and trains as that plugin does; --plugin none resumes as ACE-Step does, without them."
        )
    return plugins


def _checkpoint(said: str, output: str | None) -> Path | None:
    """The folder of a checkpoint to resume from; None where none is found."""
    from sidestep_plugin.resuming.checkpoints import STATE_FILE, UPSTREAMS_FILE, checkpoints_in, is_checkpoint

    def saved_at(folder: Path) -> float:
        file = folder / STATE_FILE
        return (file if file.is_file() else folder / UPSTREAMS_FILE).stat().st_mtime

    folder: Path | None = Path(at_home(said))
    if said == "latest":
        found = checkpoints_in(Path(at_home(output))) if output else ()
        folder = max(found, key=saved_at, default=None)  # all of one training have the same, or it is said
    elif folder is not None and folder.name == "adapter" and is_checkpoint(folder.parent):
        folder = folder.parent
    return folder if folder is not None and is_checkpoint(folder) else None


NOT_KEPT: Final = frozenset(
    {"devices", "nodes", "node_rank", "rendezvous", "max_steps", "time_limit"}  # on what it trains, and for how long
)
"""Plugins' options that a training which is resumed does not take from its checkpoint."""


def options_to_resume(said: str, output: str | None, declared: Sequence[click.Option]) -> SettingsFile:
    """What a checkpoint says about the plugins' options with which its training is resumed.

    Args:
        said: the value of ``--resume-from``.
        output: that of ``--output-dir``.
        declared: the options of the plugins that take part.

    Raises:
        Refusal: the file beside it cannot be read.
    """
    names = {str(option.name) for option in declared} - NOT_KEPT
    folder = _checkpoint(said, output)
    files = [] if folder is None else [folder / FILE_NAME, folder / "adapter" / FILE_NAME]
    for file in files:
        if file.is_file():
            values = SettingsFile.read(str(file)).values
            return SettingsFile(file, {name: value for name, value in values.items() if name in names})
    return SettingsFile.empty()


def options_resumed_with(
    declared: Sequence[click.Option], kept: Mapping[str, Any], took: Collection[str], options: Mapping[str, Any]
) -> Iterator[str]:
    """Lines about the plugins' options of a training that is resumed.

    Args:
        declared: the options of the plugins that take part.
        kept: what the checkpoint says about them, by name.
        took: names of those that were taken from it: nobody has said another value.
        options: the values that they have now.
    """
    from .command_line import option_words, quoted

    if words := [word for option in declared if option.name in took for word in option_words(option, options)]:
        yield f"Options: {quoted(words)}, as in the checkpoint"
    # Of what the plugin sidestep brings, the adapter's facts are compared.
    for option in declared:
        if (name := str(option.name)) in kept and name not in took and owner_of(name) is None:
            then, now = (quoted(option_words(option, values)) or "left out" for values in (kept, options))
            if then != now:
                yield f"Note: changed since the checkpoint: {option.opts[0]} (was {then}, now {now})"


def resumed_with(plugins: tuple[str, ...], checkpoint: Path) -> str:
    """A line about the plugins of a training that is resumed, beside those of its checkpoint. Raises Refusal."""
    before = plugins_of(checkpoint) or ()
    if before == plugins:
        return f"Plugins: {_named(plugins)}, as in the checkpoint"
    return f"Note: changed since the checkpoint: plugins (was {_named(before)}, now {_named(plugins)})"


def settings_to_resume(checkpoint: Path, kind: str) -> dict[str, Any]:
    """The settings that a checkpoint was trained with, by option name: those of the file beside it, else its facts.

    Raises:
        Refusal: that file cannot be read, or holds values that cannot be used.
    """
    from sidestep_plugin.engine.configs import ADAPTER_FIELDS, TRAINING_FIELDS
    from sidestep_plugin.launch.output_folder import settings_of_checkpoint

    from .training_options import settings_from

    settings = settings_of_checkpoint(checkpoint, kind)
    names = {*ADAPTER_FIELDS[kind], *TRAINING_FIELDS}
    context = click.get_current_context()
    for folder in (checkpoint, checkpoint / "adapter"):
        if (file := folder / FILE_NAME).is_file():
            values = SettingsFile.read(str(file)).values
            if values.get("adapter_type") == kind:
                own = SettingsFile(file, {name: value for name, value in values.items() if name in names})
                settings |= settings_from(own.checked(context.command.get_params(context), context))
    return settings


def _named(plugins: tuple[str, ...]) -> str:
    return ", ".join(plugins or as_said(plugins))
