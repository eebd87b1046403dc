"""Makes every checkpoint resumable, and lets a training go on from one as if it had never stopped.

The host keeps the journal of a run and puts things in place; here is decided what a checkpoint says, and whether it is
one of this training: another model, rank or set of layers is refused, another learning rate is said.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from sidestep_plugin import Refusal, hookimpl
from sidestep_plugin.checkpoints import read_checkpoint, write_resume_state
from sidestep_plugin.metadata import describe_run
from sidestep_plugin.resume import ResumePoint
from sidestep_plugin.run import Run, SavedAdapter

from .model_treatment import other_sampler, treatment_of

MUST_BE_EQUAL: Final = {
    "adapter_type": "adapter type",
    "model_name": "model",
    "model_variant": "variant",
    "rank": "rank",
    "alpha": "alpha",
    "target_modules": "target modules",
    "songs": "number of songs",
    "batch_size": "batch size",
    "val_split": "validation split",
}
"""Facts of a checkpoint that decide whether its weights and its place in the songs mean anything in another run."""

MAY_CHANGE: Final = {
    "timestep_law": "timesteps",
    "cfg_ratio": "condition dropout",
    "dropout": "dropout",
    "learning_rate": "learning rate",
    "max_epochs": "epochs",
    "warmup_steps": "warmup steps",
    "weight_decay": "weight decay",
    "max_grad_norm": "longest gradient",
    "gradient_accumulation_steps": "gradient accumulation",
    "mixed_precision": "precision",
    "seed": "seed (the random states are those of the checkpoint)",
}
"""Facts that may be other ones from here on, as long as that is said."""


@hookimpl(specname="acestep_adapter_saved")
def keep_resume_state(run: Run, saved: SavedAdapter) -> list[str] | None:
    if saved.resume_point is None:
        return None
    try:
        write_resume_state(saved.folder, saved.resume_point)
    except OSError as error:
        return [f"Warning: nothing can be resumed from {saved.destination.parent}: {error.strerror or error}."]
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
                "settings that it was made with, or train anew without --resume-from."
            )
        lines += [
            f"Note: changed since the checkpoint: {what}" for what in _differences(MAY_CHANGE, checkpoint.facts, now)
        ]
    if checkpoint.point.random is None:
        lines.append("Note: the checkpoint has no random states, so from here on others are drawn than without a stop.")
    if checkpoint.point.losses is None:
        lines.append("Note: the checkpoint has no losses, so the curves show zeros up to here.")
    max_epochs = getattr(run.training_config, "max_epochs", None)
    point = checkpoint.point
    if isinstance(max_epochs, int) and (point.epochs, point.steps) > (max_epochs, 0):
        raise Refusal(
            f"{checkpoint.folder} was saved in epoch {point.epochs + 1}, and {max_epochs} epochs were asked for. "
            "Say more --epochs."
        )
    if point.gradients is not None and checkpoint.facts is not None:
        name = "gradient_accumulation_steps"
        then, asked = checkpoint.facts.get(name), getattr(run.training_config, name, None)
        if then != asked:
            raise Refusal(
                f"{checkpoint.folder} was saved between two optimizer steps of {then} steps each; here they are of "
                f"{asked}. Resume with --gradient-accumulation {then}."
            )
    return dataclasses.replace(point, lines=tuple(lines))


def _differences(names: Mapping[str, str], then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Facts that both know and that differ, in words."""
    return [
        f"its {words} was {then[name]}, here it is {now[name]}"
        for name, words in names.items()
        if name in then and name in now and then[name] is not None and then[name] != now[name]
    ]
