"""Runs one of upstream's own commands in this process, so that plugins are attached when it imports the trainer."""

from __future__ import annotations

import importlib.metadata
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import Refusal
from .checkout import project_of


def find_command(words: tuple[str, ...], root: Path | None) -> Callable[[], Any]:
    """What a command line means: an installed command, one of the checkout's, a module, or a script.

    Args:
        words: ``acestep --port 7860``, ``python -m MODULE ...``, ``-m MODULE ...``, ``script.py ...``.
        root: the checkout, whose pyproject.toml names commands that may not be installed.

    Returns:
        A function that runs it with ``sys.argv`` set. What it raises, ``SystemExit`` included, is the command's own.

    Raises:
        Refusal: there is no such command.
    """
    name, *arguments = words
    if re.fullmatch(r"(python|py)[\d.]*(\.exe)?", Path(name).name.lower()):
        if not arguments or (arguments[0].startswith("-") and arguments[0] != "-m"):
            raise Refusal(f"Expected a script or -m MODULE after {name}, found {' '.join(arguments) or 'nothing'}.")
        name, *arguments = arguments
    if name == "uv":
        raise Refusal("uv starts its own process. Put it first: uv run acestep-train run ... -- acestep")
    if name == "-m":
        if not arguments:
            raise Refusal("Expected a module name after -m, as in -m acestep.acestep_v15_pipeline.")
        module, *arguments = arguments
        return lambda: _with_arguments([module, *arguments], lambda: _run_module(module))
    if Path(name).suffix == ".py" or Path(name).is_file():
        script = Path(name)
        if not script.is_file():
            raise Refusal(f"No script {script}. Give the path of an existing file.")
        return lambda: _with_arguments([str(script), *arguments], lambda: _run_script(script))
    installed = importlib.metadata.entry_points(group="console_scripts")
    commands = {point.name: point.value for point in installed} | _in_checkout(root)
    if name not in commands:
        ours = [command for command in sorted(commands) if command.startswith("acestep") and command != "acestep-train"]
        raise Refusal(
            f"No command {name!r}. Expected one of ACE-Step's ({', '.join(ours) or 'none is installed'}), "
            "-m MODULE, or the path of a script."
        )
    place = commands[name]
    return lambda: _with_arguments([name, *arguments], lambda: _run_entry(place))


def _in_checkout(root: Path | None) -> dict[str, str]:
    """Commands that the checkout's pyproject.toml declares: a checkout is often used without being installed."""
    scripts = project_of(root).get("scripts", {})
    return {name: place for name, place in scripts.items() if isinstance(place, str)}


def _with_arguments(argv: list[str], action: Callable[[], Any]) -> Any:
    before, sys.argv = sys.argv, argv
    try:
        return action()
    finally:
        sys.argv = before


def _run_entry(place: str) -> Any:
    command = importlib.metadata.EntryPoint(name="", value=place, group="").load()
    sys.exit(command())  # as the installed command does


def _run_module(module: str) -> None:
    sys.path.insert(0, str(Path.cwd()))
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _run_script(script: Path) -> None:
    sys.path.insert(0, str(script.absolute().parent))
    runpy.run_path(str(script), run_name="__main__")
