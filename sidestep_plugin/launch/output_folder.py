"""The output folder: whether it can be written, what it holds already, and which checkpoint a training resumes from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from ..adapters.facts import read_training_config
from ..adapters.staging import settle_below
from ..engine.configs import ADAPTER_FIELDS, TRAINING_FIELDS
from ..engine.shapes import FINAL, INTERRUPTED
from ..errors import Refusal
from ..resuming.checkpoints import newest_checkpoint, read_checkpoint
from ..run import AdapterType

LATEST: Final = Path("latest")
"""Stands for the newest checkpoint below the output folder."""


def check_unused(output: Path, resumed: Path | None) -> None:
    """Refuse an output folder that holds the adapters of an earlier training, which would be replaced or mixed up."""
    if resumed is not None and resumed.resolve().is_relative_to(output.resolve()):
        return
    found = [name for name in (FINAL, "checkpoints", INTERRUPTED) if any((output / name).rglob("*.safetensors"))]
    if found:
        raise Refusal(
            f"{output} already holds the adapters of a training ({', '.join(found)}). Choose another --output-dir, "
            "resume that training with --resume-from latest, or replace it with --overwrite."
        )


def settings_of_checkpoint(folder: Path, kind: AdapterType) -> dict[str, Any]:
    """The settings that a checkpoint says it was trained with, by option name; {} if it does not."""
    facts = read_training_config(folder / "adapter") or read_training_config(folder) or {}
    if facts.get("adapter_type") != kind:
        return {}
    names = {name: name for name in ADAPTER_FIELDS[kind]} | TRAINING_FIELDS
    return {name: facts[fact] for name, fact in names.items() if facts.get(fact) is not None}


def check_undescribed(output: Path) -> None:
    """Refuse a training without a plugin in a folder of adapters that a plugin has described. Raises Refusal."""
    if any(output.rglob("training_config.json")):
        raise Refusal(
            f"{output} holds adapters that a plugin has described; training without it would put other weights "
            "beside those descriptions. Choose another --output-dir."
        )


def checkpoint_to_resume(
    said: Path | None, output: Path, *, by_plugin: bool, say: Callable[[str], None]
) -> Path | None:
    """The checkpoint to resume from, None for a training from the start.

    Args:
        said: the checkpoint's folder, or :data:`LATEST`.
        output: the output folder, where the latest one is looked for.
        by_plugin: whether a plugin resumes, which needs more than upstream's own checkpoint.
        say: takes notes on what was passed over.

    Raises:
        Refusal: there is no such checkpoint, or it is not complete.
    """
    if said is None:
        return None
    if said == LATEST:
        settle_below(output)
        folder, notes = newest_checkpoint(output)
        for note in notes:
            say(note)
        return folder
    if by_plugin:
        return read_checkpoint(said.absolute()).folder
    if not said.is_dir():
        raise Refusal(f"No checkpoint folder {said}. Expected one under OUTPUT/checkpoints.")
    return said.absolute()
