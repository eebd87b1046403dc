"""What a checkpoint's folder holds so that a training can go on from it, and finding the newest one that is whole.

Upstream writes the adapter and ``training_state.pt`` (optimizer, learning rate). Beside them goes
``resume_state.pt``: how far the training was, its losses, its random states, and sizes and checksums of the files that
belong to it. Both are read with ``weights_only=True``.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..adapters.facts import read_training_config
from ..adapters.staging import settle_below
from ..adapters.weights_file import read_weights_file
from ..errors import Refusal
from ..files import replacing
from ..run import ResumePoint

if TYPE_CHECKING:
    import torch

STATE_FILE: Final = "resume_state.pt"
UPSTREAMS_FILE: Final = "training_state.pt"
SCHEMA_VERSION: Final = 1

_WEIGHTS: Final = ("adapter/adapter_model.safetensors", "adapter_model.safetensors", "lokr_weights.safetensors")
_BEGAN: Final = ".training_began"
_BUFFER: Final = 2**20


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is whole.

    Attributes:
        folder: its folder.
        point: the place in the training.
        facts: its ``training_config.json``; None when it has none, as those that upstream alone made.
        alone: whether upstream alone made it.
    """

    folder: Path
    point: ResumePoint
    facts: Mapping[str, Any] | None
    alone: bool


def write_resume_state(folder: Path, point: ResumePoint) -> Path:
    """Write what resuming needs beside an adapter that was saved into a folder | returns the file.

    The optimizer's and scheduler's states go into it only where upstream has not written them itself.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    import torch

    upstreams = (folder / UPSTREAMS_FILE).is_file()
    names = [name for name in (*_WEIGHTS, UPSTREAMS_FILE) if (folder / name).is_file()]
    content = {
        "schema_version": SCHEMA_VERSION,
        "saved_at": time.time(),
        "epochs": point.epochs,
        "steps": point.steps,
        "steps_per_epoch": point.steps_per_epoch,
        "losses": point.losses,
        "validation": point.validation,
        "random": point.random,
        "epoch_random": point.epoch_random,
        "gradients": point.gradients,
        "optimizer_class": point.optimizer_class,
        "parameters": point.parameters,
        "songs": point.songs,
        "optimizer": None if upstreams else point.optimizer,
        "scheduler": None if upstreams else point.scheduler,
        "files": {name: _sum_of(folder / name) for name in names},
    }
    with replacing(folder / STATE_FILE) as stream:
        torch.save(content, stream)
    return folder / STATE_FILE


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint's folder, or the ``adapter`` folder in it, and make sure that it is whole.

    Raises:
        Refusal: it is no checkpoint, something of it is missing or cut off, or it is of a newer version of this.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not folder.is_dir():
        raise Refusal(f"No checkpoint folder {folder}. Expected one under OUTPUT/checkpoints, or the word latest.")
    if folder.name == "adapter" and not _is_checkpoint(folder) and _is_checkpoint(folder.parent):
        folder = folder.parent
    if not _is_checkpoint(folder):
        hint = " It holds others: --resume-from latest takes the newest." if any(_checkpoints_in(folder)) else ""
        raise Refusal(
            f"{folder} is no checkpoint: it has neither {STATE_FILE} nor {UPSTREAMS_FILE}, without which a training "
            f"can only begin anew.{hint}"
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
            f"{folder / STATE_FILE} is of version {state['schema_version']}, this is version {SCHEMA_VERSION}. "
            "Resume it with the sidestep-plugin that made it, or a newer one."
        )
    files = state.get("files", {})
    for name, expected in files.items() if isinstance(files, dict) else ():
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
        point = ResumePoint(
            epochs=int(upstreams["epoch"] if alone else state["epochs"]),
            steps=0 if alone else int(state["steps"]),
            steps_per_epoch=state.get("steps_per_epoch"),
            losses=state.get("losses"),
            validation=state.get("validation"),
            random=state.get("random"),
            epoch_random=state.get("epoch_random"),
            gradients=state.get("gradients"),
            optimizer=state.get("optimizer") or upstreams.get("optimizer_state_dict"),
            scheduler=state.get("scheduler") or upstreams.get("scheduler_state_dict"),
            optimizer_class=state.get("optimizer_class", ""),
            weights=tensors,
            parameters=state.get("parameters"),
            songs=state.get("songs", ""),
        )
        wrong = _wrong_in(point)
    except (KeyError, TypeError, ValueError) as error:
        wrong = repr(error)
    if wrong:
        raise _incomplete(folder, f"what was saved of the training cannot be understood ({wrong})")
    return Checkpoint(folder, point, read_training_config(weights.parent), alone)


def _wrong_in(point: ResumePoint) -> str:
    """What of a point that was read cannot be used, "" when nothing."""
    import torch

    def numbers(value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.dim() == 1 and value.is_floating_point()

    def tensors(value: Any) -> bool:
        return isinstance(value, list) and all(entry is None or isinstance(entry, torch.Tensor) for entry in value)

    def states(value: Any) -> bool:
        state = value.get("torch") if isinstance(value, dict) else None
        return isinstance(state, torch.Tensor) and state.shape == torch.get_rng_state().shape

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
        "gradients": point.gradients is None or tensors(point.gradients),
        "parameters": point.parameters is None or tensors(point.parameters),
        "optimizer": point.optimizer is None or state_dict(point.optimizer),
        "scheduler": point.scheduler is None or isinstance(point.scheduler, dict),
        "songs": isinstance(point.songs, str),
    }
    wrong = ", ".join(name for name, right in checks.items() if not right)
    if not wrong and point.losses is not None and len(point.losses) != point.epochs * (length or 0) + point.steps:
        wrong = f"{len(point.losses)} losses for {point.epochs} epochs of {length} steps and {point.steps} steps"
    return wrong


def begin_anew(output: Path) -> None:
    """Note that a new training begins in an output folder: checkpoints that are there already are another's."""
    output.mkdir(parents=True, exist_ok=True)
    (output / _BEGAN).write_text(f"{time.time()}\n", encoding="utf-8")


def began_at(output: Path) -> float:
    """When the training in an output folder began, in seconds since 1970; 0.0 if unknown."""
    try:
        return float((output / _BEGAN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0.0


def newest_checkpoint(output: Path) -> tuple[Path, list[str]]:
    """The newest whole checkpoint below an output folder, and a line for each newer one that is not whole.

    What a killed program left unfinished in there is put in order first.

    Raises:
        Refusal: there is none.
    """
    settle_below(output)
    notes: list[str] = []
    began = began_at(output)
    for folder in sorted(_checkpoints_in(output), key=_saved_at, reverse=True):
        if _saved_at(folder) < began:
            notes.append(f"Note: {folder.name} and what is older is of the training that --overwrite replaced.")
            break
        try:
            read_checkpoint(folder)
        except Refusal as refusal:
            notes.append(f"Note: skipped {folder.name}. {refusal}")
            continue
        return folder, notes
    found = f": {' '.join(notes)}" if notes else "."
    raise Refusal(f"No checkpoint to resume from in {output}{found} Start without --resume-from.")


def _is_checkpoint(folder: Path) -> bool:
    return (folder / STATE_FILE).is_file() or (folder / UPSTREAMS_FILE).is_file()


def _checkpoints_in(output: Path) -> Iterator[Path]:
    """Folders of one training that hold a state: below its output folder, and below ``checkpoints`` there."""
    for pattern in ("*/", "checkpoints/*/"):
        for folder in sorted(output.glob(pattern)):
            if not folder.name.startswith(".") and _is_checkpoint(folder):
                yield folder


def _saved_at(folder: Path) -> float:
    """When a checkpoint was saved: as it says itself, for a copy has another date."""
    file = folder / STATE_FILE
    try:
        return float(_load(file)["saved_at"])
    except (Refusal, KeyError, TypeError, ValueError):
        # Cut off, or made by upstream alone: as far as the disk knows.
        file = file if file.is_file() else folder / UPSTREAMS_FILE
        return file.stat().st_mtime


def read_state(folder: Path) -> Mapping[str, Any]:
    """What a checkpoint says of the place in the training. Raises Refusal when it cannot be read."""
    return _load(folder / STATE_FILE)


def _load(file: Path) -> dict[str, Any]:
    import torch

    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for a damaged file
        raise _incomplete(file.parent, f"{file.name} cannot be read ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise _incomplete(file.parent, f"{file.name} holds a {type(content).__name__}, expected a dictionary")
    return content


def _sum_of(file: Path) -> list[int]:
    """Size in bytes and CRC-32 of a file; of weights without their header, into which people write titles."""
    size = checksum = 0
    start = read_weights_file(file).data_start if file.suffix == ".safetensors" else 0
    with file.open("rb") as stream:
        stream.seek(start)
        while piece := stream.read(_BUFFER):
            size, checksum = size + len(piece), zlib.crc32(piece, checksum)
    return [size, checksum]


def _incomplete(folder: Path, why: str) -> Refusal:
    return Refusal(f"The checkpoint {folder} is not complete: {why}. Resume from another one: --resume-from latest.")
