"""The plugin ``sidestep``: everything that the product does, one file a behaviour.

    model_treatment      which variant this model is, what follows from it, and saying so before the first step
    timestep_sampling    the timesteps that the model's variant is trained with
    nan_masking          songs with NaN: refused, or zeroed where the mask hides it
    cfg_dropout          condition dropout, for the models that are generated with guidance
    memory               half the memory of the base model's weights, with the same bits
    adapter_metadata     what every saved adapter says about itself
    loss_watch           ending a training whose loss is not a number any more
    several_gpus         one process for each GPU, each with its share of the songs
    resume_training      checkpoints from which a training really goes on
    training_report      loss by epoch and by timestep, in TensorBoard and at the end

Nothing in here imports torch at import time, so that ``--help`` can list the options at once.
"""

from __future__ import annotations

import click

from sidestep_plugin import hookimpl

from . import adapter_metadata, memory, model_treatment, nan_masking, several_gpus
from .adapter_metadata import acestep_adapter_saved
from .loss_watch import acestep_step_finished
from .memory import acestep_plan_memory
from .model_treatment import acestep_model_chosen, acestep_run_started
from .nan_masking import acestep_prepare_batch, check_song_values
from .resume_training import acestep_resume, keep_resume_state
from .several_gpus import acestep_plan_processes
from .timestep_sampling import acestep_sample_timesteps
from .training_report import acestep_epoch_finished, acestep_run_ended, note_step

__all__ = [
    "acestep_adapter_saved",
    "acestep_epoch_finished",
    "acestep_model_chosen",
    "acestep_options",
    "acestep_plan_memory",
    "acestep_plan_processes",
    "acestep_prepare_batch",
    "acestep_resume",
    "acestep_run_ended",
    "acestep_run_started",
    "acestep_sample_timesteps",
    "acestep_step_finished",
    "check_song_values",
    "keep_resume_state",
    "note_step",
]


@hookimpl
def acestep_options() -> list[click.Option]:
    return [
        *model_treatment.options(),
        *nan_masking.options(),
        *adapter_metadata.options(),
        *memory.options(),
        *several_gpus.options(),
    ]
