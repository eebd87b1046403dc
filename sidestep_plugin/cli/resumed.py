"""Which plugins and settings a checkpoint was trained with: a training that is resumed goes on with the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sidestep_plugin.errors import Refusal
from sidestep_plugin.files import at_home

from .commands import NONE, OURS, as_said, chosen
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
    if folder is None or not is_checkpoint(folder):
        return None
    if (plugins := plugins_of(folder)) is None:
        raise Refusal(
            f"{folder} was saved by ACE-Step without a plugin. Say how to go on: --plugin sidestep restores the "
            "adapter's weights and trains as that plugin does; --plugin none resumes as ACE-Step does, without them."
        )
    return plugins


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
