"""Makes every checkpoint resumable, so that a training resumes as if it had never stopped.

The host records the run and restores its state. This decides whether a checkpoint belongs to the training: another
model, rank or set of layers is refused; for another learning rate the user gets a notice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from sidestep_plugin import Refusal, hookimpl
from sidestep_plugin.resuming.checkpoints import UPSTREAMS_FILE, Checkpoint, read_checkpoint, write_resume_state
from sidestep_plugin.run import ResumePoint, Run, SavedAdapter
from sidestep_plugin.songs.fingerprint import fingerprint, songs_changed

from .adapter_facts import describe_run
from .model_treatment import other_sampler, treatment_of
from .validation import resume_validation, to_keep

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

WHEN_OFF: Final = {"crop_seconds": "whole songs", "base_weights": "not quantized"}
"""Facts that are left out when the feature is off, and what they mean then."""


@hookimpl(specname="acestep_adapter_saved")
def keep_resume_state(run: Run, saved: SavedAdapter) -> list[str] | None:
    point = saved.resume_point
    if point is None:
        return None
    try:
        write_resume_state(
            saved.folder, dataclasses.replace(point, songs=fingerprint(run.tensor_dir), held_out=to_keep(run))
        )
    except OSError as error:
        # Without our state, upstream's would pass for a checkpoint that upstream alone made, and be resumed otherwise.
        (saved.folder / UPSTREAMS_FILE).unlink(missing_ok=True)
        return [f"Warning: no training can be resumed from {saved.destination.parent}: {error.strerror or error}."]
    if "loss_0.0000" in str(saved.destination) and point.losses is not None and point.steps_per_epoch:
        mean = float(point.losses[-point.steps_per_epoch :].float().mean())
        return [f"Note: ACE-Step names this checkpoint loss_0.0000; the mean loss of its epoch was {mean:.4f}."]
    return None


@hookimpl
def acestep_resume(run: Run, folder: Path) -> ResumePoint:
    checkpoint = read_checkpoint(folder)
    lines = [f"Resuming from {checkpoint.folder}: the adapter's weights, optimizer, learning rate, random states"]
    if checkpoint.facts is None:
        lines.append("Note: the checkpoint does not say for which model it was made, so only its tensors are compared.")
    else:
        now = describe_run(run, treatment_of(run), other_sampler(run))
        if other := _differences(MUST_BE_EQUAL, checkpoint.facts, now):
            raise Refusal(
                f"{checkpoint.folder} is a checkpoint of another training: {'; '.join(other)}. Resume with the "
                "settings that it was made with, or start again without --resume-from."
            )
        lines += [
            f"Note: changed since the checkpoint: {what}" for what in _differences(MAY_CHANGE, checkpoint.facts, now)
        ]
    lines += resume_validation(run, checkpoint.folder, checkpoint.point.held_out)
    max_epochs = getattr(run.training_config, "max_epochs", None)
    point, before = checkpoint.point, max(1, len(checkpoint.point.ranks))
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
        nothing = dict.fromkeys(("steps_per_epoch", "losses", "validation", "epoch_random", "gradients", "scheduler"))
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
