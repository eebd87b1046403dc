"""What a checkpoint's folder stores so that a training can be resumed, and which checkpoint is the newest complete one.

Upstream writes the adapter and ``training_state.pt`` (optimizer, learning rate). This adds ``resume_state.pt``: the
position in the training, losses, random states, and sizes and checksums of the files that belong to it. Both are read
with ``weights_only=True``.
"""

from __future__ import annotations

import json
import math
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..adapters.facts import read_training_config
from ..adapters.kinds import KINDS
from ..adapters.weights_file import read_weights_file
from ..engine.random_states import are_random_states
from ..errors import Refusal
from ..files import not_a_file, read_json_object, replacing
from ..run import ResumePoint

if TYPE_CHECKING:
    import torch

STATE_FILE: Final = "resume_state.pt"
UPSTREAMS_FILE: Final = "training_state.pt"
SCHEMA_VERSION: Final = 1

_WEIGHTS: Final = tuple(file for kind in KINDS for file in kind.weight_files if file.endswith(".safetensors"))
ASIDE: Final = "overwritten"
"""Folder below the output folder into which the checkpoints of an overwritten training are moved."""

BEGAN: Final = ".training_began"
"""File with the time at which a training was overwritten; earlier versions wrote it, and no save numbers."""

FINISHED: Final = ".training_finished"
"""File that says after how many epochs the training in a folder was finished, by what if early, and its newest save."""

_STORED: Final = (
    "epochs", "steps", "steps_per_epoch", "losses", "validation", "random", "epoch_random", "gradients",
    "optimizer_class", "parameters", "songs",
)  # fmt: skip
"""Attributes of a point that are in the file as they are, under the same names."""

_OWN: Final = frozenset(
    {*_STORED, "schema_version", "saved_at", "save_number", "ranks", "optimizer", "scheduler", "files"}
)
"""Names in the file; every other one is what a part of the plugin keeps."""

_UNREADABLE: Final = 2**63
_BUFFER: Final = 2**20


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    folder: Path
    point: ResumePoint
    facts: Mapping[str, Any] | None  # its ``training_config.json``; None without one, as when upstream saved it alone


def write_resume_state(folder: Path, point: ResumePoint) -> Path:
    """Write what resuming needs beside an adapter that was just saved. Returns the file.

    The states of optimizer and scheduler are included only if upstream has not written them itself.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    import torch

    upstreams = (folder / UPSTREAMS_FILE).is_file()
    names = [name for name in (*_WEIGHTS, UPSTREAMS_FILE) if (folder / name).is_file()]
    content = {
        "schema_version": SCHEMA_VERSION,
        "saved_at": time.time(),
        **{name: getattr(point, name) for name in _STORED},
        **point.kept,
        "save_number": point.save_number,
        **({"ranks": list(point.ranks)} if point.ranks else {}),
        "optimizer": None if upstreams else point.optimizer,
        "scheduler": None if upstreams else point.scheduler,
        "files": {name: _sum_of(folder / name) for name in names},
    }
    with replacing(folder / STATE_FILE) as stream:
        try:
            torch.save(content, stream)
        except RuntimeError as error:  # of a full disk, torch tells how many bytes its archive lacks
            if (reason := _no_room(error)) is None:
                raise
            raise reason from error
    return folder / STATE_FILE


def _no_room(error: BaseException) -> OSError | None:
    """The error of the disk behind one of torch's; None if there is none."""
    while (before := error.__cause__ or error.__context__) is not None:
        if isinstance(before, OSError):
            return before
        error = before
    return None


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint's folder, or the ``adapter`` folder in it, and check that it is complete.

    Raises:
        Refusal: it is not a checkpoint, something is missing or damaged, or a newer version of this package saved it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not folder.is_dir():
        raise Refusal(f"No checkpoint folder {folder}. Expected one under OUTPUT/checkpoints, or the word latest.")
    if folder.name == "adapter" and not is_checkpoint(folder) and is_checkpoint(folder.parent):
        folder = folder.parent
    if not is_checkpoint(folder):
        hint = " It holds checkpoints: --resume-from latest takes the newest." if any(checkpoints_in(folder)) else ""
        raise Refusal(
            f"{folder} is not a checkpoint: it has neither {STATE_FILE} nor {UPSTREAMS_FILE}, so no training can be "
            f"resumed from it. Choose a folder under OUTPUT/checkpoints.{hint}"
        )
    weights = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise _incomplete(folder, f"there are no adapter weights ({' or '.join(_WEIGHTS)})")
    alone = not (folder / STATE_FILE).is_file()
    state = {} if alone else _load(folder / STATE_FILE)
    if not isinstance(state.get("schema_version", 1), int):
        raise _incomplete(folder, f"{STATE_FILE} has no version that is a number")
    if state.get("schema_version", 1) != SCHEMA_VERSION:
        raise Refusal(
            f"{folder / STATE_FILE} has version {state['schema_version']}, expected {SCHEMA_VERSION}. Resume it with "
            "the sidestep-plugin that saved it, or a newer one."
        )
    files = state.get("files", {})
    for name, expected in files.items() if isinstance(files, dict) else ():
        name = str(name)
        if not (folder / name).is_file():
            raise _incomplete(folder, f"{name} is missing")
        try:
            found = _sum_of(folder / name)
        except Refusal as refusal:
            raise _incomplete(folder, str(refusal)) from None
        if found != expected:
            raise _incomplete(folder, f"{name} is not what was saved")
    upstreams = _load(folder / UPSTREAMS_FILE) if (folder / UPSTREAMS_FILE).is_file() else {}
    try:
        tensors: dict[str, torch.Tensor] = load_file(weights)
    except (SafetensorError, OSError) as error:
        raise _incomplete(folder, f"{weights.name} cannot be read ({error})") from None
    try:
        known: dict[str, Any] = {name: state[name] for name in (*_STORED, "save_number", "ranks") if name in state}
        known["epochs"] = int(upstreams["epoch"] if alone else state["epochs"])
        known["steps"] = 0 if alone else int(state["steps"])
        point = ResumePoint(
            **known,
            optimizer=state.get("optimizer") or upstreams.get("optimizer_state_dict"),
            scheduler=state.get("scheduler") or upstreams.get("scheduler_state_dict"),
            weights=tensors,
            kept={name: value for name, value in state.items() if name not in _OWN},
        )
        wrong = _wrong_in(point)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        wrong = repr(error)
    if wrong:
        raise _incomplete(folder, f"what was saved of the training is unusable ({wrong})")
    return Checkpoint(folder, point, read_training_config(weights.parent))


def _wrong_in(point: ResumePoint) -> str:
    """What is unusable in a point that was read; "" when nothing is."""
    import torch

    def numbers(value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.dim() == 1 and value.is_floating_point()

    def tensors(value: Any) -> bool:
        return isinstance(value, list) and all(entry is None or isinstance(entry, torch.Tensor) for entry in value)

    def states(value: Any) -> bool:
        return isinstance(value, dict) and are_random_states(value)

    def of_ranks(value: Any) -> bool:
        return isinstance(value, list | tuple) and all(
            isinstance(entry, dict)
            and states(entry.get("random"))
            and (entry.get("epoch_random") is None or states(entry["epoch_random"]))
            for entry in value
        )

    def state_dict(value: Any) -> bool:
        return isinstance(value, dict) and isinstance(value.get("state"), dict) and "param_groups" in value

    length = point.steps_per_epoch
    checks = {
        "epochs": point.epochs >= 0 <= point.steps and point.epochs + point.steps > 0,
        "steps_per_epoch": length is None or (isinstance(length, int) and length > 0),
        "losses": point.losses is None or numbers(point.losses),
        "validation": point.validation is None or numbers(point.validation),
        "random": point.random is None or states(point.random),
        "epoch_random": point.epoch_random is None or states(point.epoch_random),
        "ranks": of_ranks(point.ranks),
        "gradients": point.gradients is None or tensors(point.gradients),
        "parameters": point.parameters is None or tensors(point.parameters),
        "optimizer": point.optimizer is None or state_dict(point.optimizer),
        "scheduler": point.scheduler is None or isinstance(point.scheduler, dict),
        "songs": isinstance(point.songs, str),
        **{name: value is None or isinstance(value, dict) for name, value in point.kept.items()},
        "save_number": isinstance(point.save_number, int) and 0 <= point.save_number < _UNREADABLE,
    }
    wrong = ", ".join(name for name, right in checks.items() if not right)
    if not wrong and point.losses is not None and len(point.losses) != point.epochs * (length or 0) + point.steps:
        wrong = f"{len(point.losses)} losses for {point.epochs} epochs of {length} steps and {point.steps} steps"
    return wrong


def newest_checkpoint(output: Path) -> tuple[Path, list[str]]:
    """The newest complete checkpoint below an output folder, and a line for each newer one that is not complete.

    Only looks. Whoever holds the folder's lock calls :func:`..adapters.staging.settle_below` first.

    Raises:
        Refusal: there is none.
    """
    notes: list[str] = []
    began = _began(output)
    for folder in sorted(checkpoints_in(output), key=saved_before, reverse=True):
        number, saved_at = saved_before(folder)
        if number == 0 and saved_at < began:
            notes.append(f"Note: {folder.name} and older ones are of the training that --overwrite replaced.")
            break
        try:
            read_checkpoint(folder)
        except Refusal as refusal:
            notes.append(f"Note: skipped {folder.name}. {refusal}")
            continue
        return folder, notes
    if finished_epochs(output) is not None:
        raise Refusal(
            f"The training in {output} is finished and left no checkpoint to resume from. Choose another --output-dir, "
            "or train again with --overwrite."
        )
    if any(checkpoints_in(output / ASIDE)):
        notes.append(f"Note: {output / ASIDE} holds those of the training that --overwrite replaced.")
    found = f": {' '.join(notes)}" if notes else "."
    raise Refusal(f"No checkpoint to resume from in {output}{found} Start without --resume-from.")


def newest_save_number(output: Path) -> int:
    """The highest number of a save in an output folder; 0 when there is none with a number."""
    return max((number for number, _ in map(saved_before, checkpoints_in(output)) if number < _UNREADABLE), default=0)


def write_finished(output: Path, epochs: int, limits: Mapping[str, float]) -> None:
    """Note that the training in an output folder has saved its final adapter. Raises OSError.

    Args:
        epochs: after how many epochs it has ended.
        limits: which options have ended it before its last epoch, and up to which value each of them would have.
    """
    content = json.dumps({"epochs": epochs, "save_number": newest_save_number(output), "limits": dict(limits)})
    with replacing(output / FINISHED) as stream:
        stream.write(content.encode("utf-8"))


def finished_epochs(output: Path) -> int | None:
    """After how many epochs the training in an output folder was finished; None when it went on after that."""
    content = _finished(output)
    epochs, number = content.get("epochs"), content.get("save_number")
    return epochs if isinstance(epochs, int) and number == newest_save_number(output) else None


def limits_of(output: Path) -> dict[str, float]:
    """The options that ended the training in an output folder before its last epoch, and up to which value."""
    limits = _finished(output).get("limits")
    known = limits.items() if isinstance(limits, dict) else ()
    return {name: limit for name, limit in known if isinstance(limit, int | float)}


def _finished(output: Path) -> dict[str, Any]:
    try:
        return read_json_object(output / FINISHED)
    except (OSError, ValueError):
        return {}


def _began(output: Path) -> float:
    if not_a_file(output / BEGAN):
        return 0.0
    try:
        return float((output / BEGAN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0.0


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds the state of a training."""
    return (folder / STATE_FILE).is_file() or (folder / UPSTREAMS_FILE).is_file()


def checkpoints_in(output: Path) -> Iterator[Path]:
    """Folders of one training that hold a state: in its output folder and in ``checkpoints`` there."""
    for pattern in ("*/", "checkpoints/*/"):
        for folder in sorted(output.glob(pattern)):
            if not folder.name.startswith(".") and is_checkpoint(folder):
                yield folder


def saved_before(folder: Path) -> tuple[int, float]:
    """The larger, the newer: the number of the save, which no clock can change.

    Checkpoints of earlier versions and of upstream alone have no number and are older than any with one. Only a time
    can order them: the one in the checkpoint, because a copy has another, else that of its file. One that cannot be
    read comes first, so that it is not left out in silence.
    """
    file = folder / STATE_FILE
    if file.is_file():
        try:
            state = _load(file)
        except Refusal:
            return _UNREADABLE, file.stat().st_mtime
        if isinstance(number := state.get("save_number"), int) and 0 < number < _UNREADABLE:
            return number, 0.0
        if isinstance(saved_at := state.get("saved_at"), int | float) and math.isfinite(saved_at):
            return 0, float(saved_at)
    file = file if file.is_file() else folder / UPSTREAMS_FILE
    return 0, file.stat().st_mtime


def read_state(folder: Path) -> Mapping[str, Any]:
    """What a checkpoint says of the place in the training. Raises Refusal when it cannot be read."""
    return _load(folder / STATE_FILE)


def _load(file: Path) -> dict[str, Any]:
    import torch

    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds of errors for a damaged file
        raise _incomplete(file.parent, f"{file.name} cannot be read ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise _incomplete(file.parent, f"{file.name} holds a {type(content).__name__}, expected a dictionary")
    return content


def _sum_of(file: Path) -> list[int]:
    """Size in bytes and CRC-32 of a file; for weights without the header, into which people write titles."""
    size = checksum = 0
    start = read_weights_file(file).data_start if file.suffix == ".safetensors" else 0
    with file.open("rb") as stream:
        stream.seek(start)
        while piece := stream.read(_BUFFER):
            size, checksum = size + len(piece), zlib.crc32(piece, checksum)
    return [size, checksum]


def _incomplete(folder: Path, why: str) -> Refusal:
    return Refusal(
        f"The checkpoint {folder} is not complete: {why}. Resume from another one, as with --resume-from latest."
    )
