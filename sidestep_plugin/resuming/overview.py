"""Lists what a training has saved: epoch, steps, loss and size of each checkpoint.

Read from the files that describe an adapter and from the training's report. Only if these do not have a checkpoint's
loss, as while the training is still running, it is read from the checkpoint itself, which needs torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..adapters.facts import read_training_config
from ..adapters.staging import AVERAGE
from ..errors import Refusal
from ..files import read_json_object

_REPORT: Final = "training_report.json"
_NAME: Final = re.compile(r"epoch_(\d+)(?:_loss_(\d+\.\d+))?")


@dataclass(frozen=True)
class Saved:
    """One adapter that a training has saved."""

    name: str  # its folder, relative to the output folder
    epoch: int | None  # epochs done; None if unknown
    training_steps: int | None  # training steps done; None if unknown
    optimizer_steps: int | None  # optimizer steps done; None if unknown
    loss: float | None  # mean loss of its last epoch; None if unknown
    validation_change: float | None  # relative to the model without adapter, -0.02 is 2 % lower; None if unknown
    average: str | None  # folder of the average beside it, relative to the output folder; None without one (--average)
    average_change: float | None  # the average's validation loss relative to the model without adapter; None if unknown
    bytes: int  # size of all files in the folder
    resumable: bool  # whether a training can be resumed from it


def saved_in(output: Path) -> list[Saved]:
    """What the training in an output folder has saved, earliest first.

    Raises:
        Refusal: there is no such folder, or no adapter in it.
    """
    from .checkpoints import STATE_FILE, UPSTREAMS_FILE

    if not output.is_dir():
        raise Refusal(f"No folder {output}. Expected the --output-dir of a training.")
    losses = _losses(output)
    found = []
    entries = [entry for pattern in ("checkpoints/*", "interrupted", "final") for entry in output.glob(pattern)]
    for folder in (entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")):
        files = [file for file in folder.rglob("*") if file.is_file()]
        own = (file for file in files if file.suffix == ".safetensors" and file.relative_to(folder).parts[0] != AVERAGE)
        weights = next(own, None)
        if weights is None:
            continue
        facts = read_training_config(weights.parent) or {}
        name = _NAME.fullmatch(folder.name)
        steps, final = _whole(facts.get("training_steps")), folder.name == "final"
        epoch = _whole(facts.get("epoch"))
        if epoch is None and final:  # earlier versions did not say it
            epoch = _whole(facts.get("max_epochs"))
        if epoch is None and name is not None:
            epoch = int(name[1])
        loss = losses.get(epoch) if epoch is not None else None
        if loss is None and (folder / STATE_FILE).is_file():
            loss = _loss_in(folder)
        if loss is None and name is not None and name[2] and float(name[2]) > 0.0:
            loss = float(name[2])  # by ACE-Step's own count, which some versions leave at zero
        averaged = any(file.parent == folder / AVERAGE and file.suffix == ".safetensors" for file in files)
        of_average = (read_training_config(folder / AVERAGE) if averaged else None) or {}
        found.append(
            Saved(
                name=folder.relative_to(output).as_posix(),
                epoch=epoch,
                training_steps=steps,
                optimizer_steps=_whole(facts.get("global_step")),
                loss=loss,
                validation_change=_number(facts.get("validation_change")),
                average=(folder / AVERAGE).relative_to(output).as_posix() if averaged else None,
                average_change=_number(of_average.get("validation_change")),
                bytes=sum(file.stat().st_size for file in files),
                resumable=any((folder / state).is_file() for state in (STATE_FILE, UPSTREAMS_FILE)),
            )
        )
    if not found:
        raise Refusal(f"There is no adapter in {output}. Expected the --output-dir of a training.")
    return sorted(found, key=lambda saved: (saved.name == "final", saved.epoch or 0, saved.training_steps or 0))


def _losses(output: Path) -> dict[int, float]:
    """Mean losses by epoch from the training's report."""
    try:
        entries = read_json_object(output / _REPORT)["loss_by_epoch"]
        return {int(entry["epoch"]): float(entry["loss"]) for entry in entries if entry["loss"] is not None}
    except (OSError, ValueError, TypeError, LookupError):
        return {}


def _loss_in(folder: Path) -> float | None:
    """The mean loss of the last epoch, or of the part of it that is done, from a checkpoint's own state."""
    from .checkpoints import read_state

    try:
        state = read_state(folder)
        done = int(state["steps"]) or int(state["steps_per_epoch"])
        last = state["losses"][-done:]
        return float(last.mean()) if len(last) else None
    except (Refusal, KeyError, TypeError, ValueError, AttributeError):
        return None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
