"""Makes every checkpoint resumable, so that a training resumes as if it had never stopped.

The host records the run and restores its state. This decides whether a checkpoint belongs to the training: another
model, rank or set of layers is refused; for another learning rate the user gets a notice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from ..engine.current import command_line
from ..errors import Refusal
from ..files import remove_unfinished
from ..hookspecs import hookimpl
from ..run import ResumePoint, Run, SavedAdapter
from ..songs.fingerprint import fingerprint, songs_changed
from ..text import counted
from .checkpoints import (
    UPSTREAMS_FILE,
    Checkpoint,
    finished_epochs,
    limits_of,
    newest_save_number,
    read_checkpoint,
    write_finished,
    write_resume_state,
)
from .lock import OutputLock

MUST_BE_EQUAL: Final = {
    "adapter_type": "adapter type",
    "model_name": "model",
    "model_variant": "variant",
    "rank": "rank",
    "alpha": "alpha",
    "target_modules": "target modules",
    "songs": "number of songs",
    "val_split": "validation split",
}
"""Facts of a checkpoint without which its weights, or its position in the songs, mean nothing in another run."""

MAY_CHANGE: Final = {
    "batch_size": "batch size",
    "timestep_law": "timesteps",
    "cfg_ratio": "condition dropout",
    "crop_seconds": "crops in seconds",
    "base_weights": "base weights",
    "mask_nan": "zeros for hidden NaN",
    "compiled": "compiled blocks",
    "dropout": "dropout",
    "learning_rate": "learning rate",
    "max_epochs": "epochs",
    "warmup_steps": "warmup steps",
    "weight_decay": "weight decay",
    "max_grad_norm": "gradient clipping norm",
    "gradient_accumulation_steps": "gradient accumulation",
    "mixed_precision": "precision",
    "seed": "seed (the random states are those of the checkpoint)",
}
"""Facts that may change from here on; the user gets a notice."""

WHEN_OFF: Final = {
    "crop_seconds": "whole songs",
    "base_weights": "not quantized",
    "mask_nan": False,
    "compiled": False,
}
"""Facts that are left out when the feature is off, and what they mean then."""

_SONGS: Final = "sidestep.songs_at_the_start"


@hookimpl
def acestep_adapter_saved(run: Run, saved: SavedAdapter) -> list[str] | None:
    point = saved.resume_point
    if point is None:
        return None
    try:
        kept = point.kept or {name: tell() for name, tell in run.keeps.items()}
        write_resume_state(saved.folder, dataclasses.replace(point, songs=run.state[_SONGS], kept=kept))
    except OSError as error:
        # Without our state, upstream's would pass for a checkpoint that upstream alone made, and be resumed otherwise.
        (saved.folder / UPSTREAMS_FILE).unlink(missing_ok=True)
        within = len(saved.weights.relative_to(saved.folder).parts)
        checkpoint = saved.destination.parents[within - 1]
        return [f"Warning: no training can be resumed from {checkpoint}: {error.strerror or error}."]
    if "loss_0.0000" in str(saved.destination) and point.losses is not None and point.steps_per_epoch:
        mean = float(point.losses[-point.steps_per_epoch :].float().mean())
        return [f"Note: ACE-Step names this checkpoint loss_0.0000; the mean loss of its epoch was {mean:.4f}."]
    return None


@hookimpl
def engine_opening(run: Run) -> list[str]:
    """Lock the output folder until the training ends; the command line has done so already. Raises Refusal."""
    folder = run.engine.folder
    run.saves = newest_save_number(folder)
    if not run.ranks.first:
        return []
    run.state[_SONGS] = fingerprint(run.tensor_dir)  # now: a folder may change while its songs are trained on
    warning = None
    if not run.engine.ends_the_program:
        lock = OutputLock(folder)
        lock.acquire()
        run.engine.at_end(lock.release)
        warning = lock.warning
    remove_unfinished(folder)
    return [] if warning is None else [warning]


@hookimpl
def engine_final_saved(run: Run, epochs: int, limits: Mapping[str, float]) -> None:
    with suppress(OSError):  # then a resumed run only goes through the last epochs again
        write_finished(run.engine.folder, epochs, limits)


@hookimpl
def engine_read_checkpoint(folder: Path) -> ResumePoint:
    return read_checkpoint(folder).point


@hookimpl
def engine_resume(run: Run, folder: Path) -> ResumePoint:
    checkpoint = read_checkpoint(folder)
    lines = [f"Resuming from {checkpoint.folder}: the adapter's weights, optimizer, learning rate, random states"]
    if checkpoint.facts is None:
        lines.append("Note: the checkpoint does not say for which model it was made, so only its tensors are compared.")
    else:
        now = run.describe()
        if other := _differences(MUST_BE_EQUAL, checkpoint.facts, now):
            raise Refusal(
                f"{checkpoint.folder} is a checkpoint of another training: {'; '.join(other)}. Resume with the "
                "settings that it was made with, or start again without --resume-from."
            )
        lines += [
            f"Note: changed since the checkpoint: {what}" for what in _differences(MAY_CHANGE, checkpoint.facts, now)
        ]
    max_epochs = getattr(run.training_config, "max_epochs", None)
    finished = _finished(run)
    point, before = dataclasses.replace(checkpoint.point, finished=finished), max(1, len(checkpoint.point.ranks))
    if isinstance(max_epochs, int) and (point.epochs, point.steps) > (max_epochs, 0):
        raise Refusal(
            f"{checkpoint.folder} was saved later than that ({point.where}), and --epochs is {max_epochs}. "
            "Choose more --epochs."
        )
    divided = before > 1 or run.ranks.several
    other_order = before != run.ranks.world_size or (divided and _changed("seed", checkpoint, run))
    if before != run.ranks.world_size:
        lines.append(
            f"Note: changed since the checkpoint: processes (was {before}, now {run.ranks.world_size}), and with them "
            "the songs for each optimizer step, the steps per epoch and the schedule of the learning rate. To keep the "
            "songs for each optimizer step, change --gradient-accumulation accordingly."
        )
    point = _of_this_process(point, run)
    if _changed("batch_size", checkpoint, run) or other_order:
        # Another number of steps per epoch, or another order: a position within one means nothing any more.
        if point.steps:
            what = "order of the songs" if other_order else "batch size"
            lines.append(f"Note: the {what} changed, so epoch {point.epochs + 1} starts over.")
        names = ("steps_per_epoch", "losses", "validation", "epoch_random", "gradients", "scheduler")
        nothing: dict[str, Any] = dict.fromkeys(names)
        point = dataclasses.replace(point, steps=0, **nothing)
    elif point.gradients is not None and _changed("gradient_accumulation_steps", checkpoint, run):
        lines.append("Note: the gradients that waited for the next optimizer step are left out.")
        point = dataclasses.replace(point, gradients=None)
    if songs_changed(point.songs, run.tensor_dir):
        lines.append("Note: the songs have changed since the checkpoint: others, more or fewer, or in another order.")
    if point.random is None:
        lines.append(
            "Note: the checkpoint has no random states, so the result will differ from a training without a stop."
        )
    if point.optimizer is None:
        lines.append("Note: the checkpoint has no optimizer state, so the optimizer starts from scratch.")
    if point.losses is None:
        lines.append("Note: the losses so far were not recorded, so the curves show zeros for them.")
    return dataclasses.replace(point, lines=tuple(lines))


def _of_this_process(point: ResumePoint, run: Run) -> ResumePoint:
    """The point with the random states of this process; one that is new has none there and keeps its own."""
    if not point.ranks and not run.ranks.several:
        return point
    known = [*point.ranks] or [{"random": point.random, "epoch_random": point.epoch_random}]
    own = known[run.ranks.rank] if run.ranks.rank < len(known) else {"random": None, "epoch_random": None}
    return dataclasses.replace(point, random=own["random"], epoch_random=own["epoch_random"])


def _changed(setting: str, checkpoint: Checkpoint, run: Run) -> bool:
    """Whether one of upstream's settings is known to have changed."""
    if checkpoint.facts is None or setting not in checkpoint.facts:
        return False
    return bool(checkpoint.facts[setting] != getattr(run.training_config, setting, None))


def _differences(names: Mapping[str, str], then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Facts that both have and that differ, in words."""
    then, now = ({**WHEN_OFF, **facts} for facts in (then, now))
    return [
        f"{words} (was {then[name]}, now {now[name]})"
        for name, words in names.items()
        if name in then and name in now and then[name] is not None and then[name] != now[name]
    ]


def _finished(run: Run) -> str:
    """Why the training is over whose newest checkpoint is asked for; "" when it goes on."""
    line, output = command_line.get(), run.engine.folder
    if line is None or not line.latest or not any((output / "final").rglob("*.safetensors")):
        return ""
    epochs, wanted = finished_epochs(output), getattr(run.training_config, "max_epochs", None)
    if epochs is None or not isinstance(wanted, int):
        return ""
    if wanted <= epochs:
        return (
            f"This training is finished after {counted(epochs, 'epoch')}; nothing was changed. "
            "To train on, ask for more --epochs."
        )
    for name, limit in limits_of(output).items():
        now = run.options.get(name)
        if isinstance(now, int | float) and now <= limit:
            option = f"--{name.replace('_', '-')}"
            return (
                f"{option} {now:g} has ended this training after {epochs} of {counted(wanted, 'epoch')}; "
                f"nothing was changed. To train on, ask for more than {option} {limit:g}, or leave it out."
            )
    return ""
