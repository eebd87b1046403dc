"""The plugin ``sidestep``: everything that the product does, one file a behaviour.

    model_treatment      which variant this model is, what follows from it, and saying so before the first step
    timestep_sampling    the timesteps that the model's variant is trained with
    batch                the order in which the next three change a batch before its step
    crops                a random window of each song, a new one every time
    nan_masking          songs with NaN: refused, or zeroed where the mask hides it
    cfg_dropout          condition dropout, for the models that are generated with guidance
    song_cache           songs stay in RAM after they were read once
    memory               half the memory of the base model's weights, with the same bits
    validation           the loss on songs that are held out: always the same songs, noise and timesteps
    quantization         the base model in one byte per weight, if asked for
    gradient_checkpointing   less memory for activations, at the price of time, with the same bits
    compiling            the decoder's blocks compiled, if asked for
    adapter_metadata     what every saved adapter says about itself
    loss_watch           ending a training whose loss is not a number any more
    previews             clips of some songs while it trains
    several_gpus         one process for each GPU, each with its share of the songs
    resume_training      checkpoints from which a training really goes on
    training_report      loss by epoch and by timestep, in TensorBoard and at the end

Nothing in here imports torch at import time, so that ``--help`` can list the options at once.
"""

from __future__ import annotations

import click

from sidestep_plugin import hookimpl

from . import (
    adapter_metadata,
    compiling,
    crops,
    gradient_checkpointing,
    memory,
    model_treatment,
    nan_masking,
    previews,
    quantization,
    several_gpus,
    song_cache,
    validation,
)
from .adapter_metadata import acestep_adapter_saved, say_trigger
from .batch import acestep_prepare_batch
from .compiling import check_compile, plan_compiling
from .crops import say_crops
from .gradient_checkpointing import check_gradient_checkpointing, plan_checkpointing
from .loss_watch import acestep_step_finished
from .memory import acestep_plan_memory
from .model_treatment import acestep_model_chosen, acestep_run_started
from .nan_masking import check_song_values
from .previews import acestep_between_epochs, check_preview_options, plan_previews
from .quantization import check_base_weights, plan_base_weights
from .resume_training import acestep_resume, keep_resume_state
from .several_gpus import acestep_plan_processes
from .song_cache import acestep_song_cache, decide_cache
from .timestep_sampling import acestep_sample_timesteps
from .training_report import acestep_epoch_finished, acestep_run_ended, note_step
from .validation import (
    acestep_hold_out,
    acestep_plan_validation,
    acestep_validated,
    check_validation,
    check_validation_folder,
    sum_up_validation,
)

__all__ = [
    "acestep_adapter_saved",
    "acestep_between_epochs",
    "acestep_epoch_finished",
    "acestep_hold_out",
    "acestep_model_chosen",
    "acestep_options",
    "acestep_plan_memory",
    "acestep_plan_processes",
    "acestep_plan_validation",
    "acestep_prepare_batch",
    "acestep_resume",
    "acestep_run_ended",
    "acestep_run_started",
    "acestep_sample_timesteps",
    "acestep_song_cache",
    "acestep_step_finished",
    "acestep_validated",
    "check_base_weights",
    "check_compile",
    "check_gradient_checkpointing",
    "check_preview_options",
    "check_song_values",
    "check_validation",
    "check_validation_folder",
    "decide_cache",
    "keep_resume_state",
    "note_step",
    "plan_base_weights",
    "plan_checkpointing",
    "plan_compiling",
    "plan_previews",
    "say_crops",
    "say_trigger",
    "sum_up_validation",
]


@hookimpl
def acestep_options() -> list[click.Option]:
    return [
        *model_treatment.options(),
        *nan_masking.options(),
        *crops.options(),
        *adapter_metadata.options(),
        *memory.options(),
        *validation.options(),
        *previews.options(),
        *song_cache.options(),
        *quantization.options(),
        *gradient_checkpointing.options(),
        *several_gpus.options(),
        *compiling.options(),
    ]
