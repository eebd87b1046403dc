"""Composes command lines that can be pasted into a shell."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .commands import as_said
from .terminal import program
from .training_options import usual_defaults

if TYPE_CHECKING:
    import click

    from sidestep_plugin.launch.launch import Request


def command_line(request: Request) -> str:
    """The command that does a training without a question, quoted for this system's shell."""
    return quoted([program(), *words_of(request)])


def words_of(request: Request, *, whole: bool = False) -> list[str]:
    """The arguments of the command that does a training without a question.

    Args:
        request: the training.
        whole: whether to name the plugin that takes part anyway.
    """
    from sidestep_plugin.registry import Registry

    words: list[str] = []
    for name in as_said(request.plugins, whole=whole):
        words += ["--plugin", name]
    words += ["--wins", request.wins] if request.wins else []
    for flag, place in (
        ("--acestep-root", request.acestep_root),
        ("--checkpoint-dir", request.checkpoint_dir),
        ("--model", request.model),
        ("--dataset-dir", request.dataset_dir),
        ("--output-dir", request.output_dir),
        ("--resume-from", request.resume_from),
        ("--device", None if request.device == "auto" else request.device),
        ("--adapter-type", request.adapter_type),
    ):
        words += [flag, str(place)] if place is not None else []
    declared = Registry.load(request.plugins, request.wins).declared_options()
    for name, value in request.settings.items():
        words += _option(f"--{name.replace('_', '-')}", value)
    for option in declared:
        words += option_words(option, request.options)
    if request.resume_from is None and request.defaults != usual_defaults(request.plugins):
        words += ["--settings", request.defaults]
    words += ["--overwrite"] if request.overwrite else []
    words += ["--allow-duplicates"] if request.allow_duplicates else []
    return words


def option_words(option: click.Option, values: Mapping[str, Any]) -> list[str]:
    """A plugin's option as it is typed; nothing where its value is the default one."""
    value = values.get(str(option.name))
    return [] if value == option.default else _option(option.opts[0], value)


def resuming_line(request: Request) -> str:
    """The command that resumes a training that was interrupted."""
    return command_line(replace(request, resume_from=Path("latest"), overwrite=False))


def quoted(words: Sequence[str]) -> str:
    """A command line for this system's shell."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def _option(flag: str, value: Any) -> list[str]:
    if value is None or value is False:
        return []
    if value is True:
        return [flag]
    if isinstance(value, tuple):  # an option that may be given several times
        return [word for entry in value for word in (flag, str(entry))]
    if isinstance(value, float) and value.is_integer() and abs(value) < 10**15:
        value = int(value)  # --validate 1, as it was typed
    return [flag, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
