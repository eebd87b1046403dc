"""Writes the options of a training beside every adapter, so that it can be repeated and shared."""

from __future__ import annotations

import re
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sidestep_plugin.hookspecs import hookimpl
from sidestep_plugin.run import NEXT_COMMANDS

from .commands import as_said
from .next_commands import next_commands
from .settings_file import FILE_NAME, write

if TYPE_CHECKING:
    from sidestep_plugin.launch.launch import Request
    from sidestep_plugin.run import Run, SavedAdapter


_ROOM: Final = 2**20  # bytes
_OF_A_MACHINE: Final = frozenset({"node_rank", "rendezvous"})
"""Options of plugins with these names tell which machine this is."""


class OptionsFile:
    """Writes :data:`~.settings_file.FILE_NAME` beside every adapter that a training saves. Itself a plugin.

    What is written are the values that ACE-Step and the plugins use, whether given or left to their defaults. Folders
    of this machine are left out.
    """

    def __init__(self, request: Request) -> None:
        self._request = request

    @hookimpl
    def engine_planned(self, run: Run) -> None:
        run.state[NEXT_COMMANDS] = partial(next_commands, self._request)  # for the page of the training

    @hookimpl
    def acestep_adapter_saved(self, run: Run, saved: SavedAdapter) -> list[str] | None:
        from sidestep_plugin.files import replacing

        text = options_of(self._request, run)
        try:
            if saved.copy_of is not None and (own := saved.copy_of / FILE_NAME).is_file():
                text = own.read_text(encoding="utf-8", errors="replace")  # of the run that has trained it
            # The last room on a disk belongs to what a training resumes from.
            if shutil.disk_usage(saved.weights.parent).free < _ROOM:
                return [f"Warning: no {FILE_NAME} was written, because the disk is nearly full. Make room on the disk."]
            with replacing(saved.weights.parent / FILE_NAME) as stream:
                stream.write(text.encode("utf-8", "replace"))
        except OSError as error:  # the adapter is there, and worth more than this file
            return [f"Warning: {FILE_NAME} could not be written: {error.strerror or error}. Make room on the disk."]
        return None


def options_of(request: Request, run: Run) -> str:
    """The options of a running training as TOML."""
    from sidestep_plugin.engine.configs import ADAPTER_FIELDS, TRAINING_FIELDS

    comments = [
        "The options of this training. To repeat it:",
        f"    acestep-train --config {FILE_NAME} --dataset-dir DIR --output-dir DIR{_folders(run)}",
    ]
    values: dict[str, Any] = {"plugin": as_said(request.plugins), "wins": request.wins}
    # A path says where things are on this machine.
    if re.search(r"[\\/~]", request.model):
        name = re.split(r"[\\/]", request.model.rstrip("\\/"))[-1]
        comments.append(f"The model was a folder of its own, {name}: add --model and where it is.")
    else:
        values["model"] = request.model
    values["adapter_type"] = request.adapter_type
    for fields, config in (
        (ADAPTER_FIELDS[request.adapter_type], run.adapter_config),
        (TRAINING_FIELDS, run.training_config),
    ):
        values |= {name: _plain(getattr(config, field, None)) for name, field in fields.items()}
    values["allow_duplicates"] = request.allow_duplicates or None
    values |= {name: _plain(value) for name, value in run.options.items() if name not in _OF_A_MACHINE}
    return write(values, comments)


def _folders(run: Run) -> str:
    """The plugins' options that are folders of this machine: without them, other options would mean nothing."""
    names = sorted(name for name, value in run.options.items() if isinstance(value, Path))
    return "".join(f" --{name.replace('_', '-')} DIR" for name in names)


def _plain(value: Any) -> Any:
    """A value that TOML has: a number, a text, a switch or a list of them; None for anything else."""
    if isinstance(value, list | tuple | set):
        return [str(entry) for entry in value] or None
    return value if isinstance(value, bool | int | float | str) else None
