"""The plugin ``sidestep``: everything that the product does, one file a behaviour.

    model_treatment      which variant this model is, what follows from it, and saying so before the first step
    timestep_sampling    the timesteps that the model's variant is trained with
    batch                the order in which the next three change a batch before its step
    crops                a random window of each song, a new one every time
    nan_masking          songs with NaN: refused, or zeroed where the mask hides it
    cfg_dropout          condition dropout, for the models that are generated with guidance
    song_cache           songs stay in RAM after they were read once
    memory               half the memory of the base model's weights, with the same bits
    quantization         the base model in one byte per weight, if asked for
    compiling            the decoder's blocks compiled, if asked for
    adapter_metadata     what every saved adapter says about itself
    loss_watch           ending a training whose loss is not a number any more
    resume_training      checkpoints from which a training really goes on
    training_report      loss by epoch and by timestep, in TensorBoard and at the end

Nothing in here imports torch at import time, so that ``--help`` can list the options at once.
"""

from __future__ import annotations

import click

from sidestep_plugin import hookimpl

from . import adapter_metadata, compiling, crops, memory, model_treatment, nan_masking, quantization, song_cache
from .adapter_metadata import acestep_adapter_saved
from .batch import acestep_prepare_batch
from .compiling import check_compile, plan_compiling
from .crops import say_crops
from .loss_watch import acestep_step_finished
from .memory import acestep_plan_memory
from .model_treatment import acestep_model_chosen, acestep_run_started
from .nan_masking import check_song_values
from .quantization import check_base_weights, plan_base_weights
from .resume_training import acestep_resume, keep_resume_state
from .song_cache import acestep_song_cache, decide_cache
from .timestep_sampling import acestep_sample_timesteps
from .training_report import acestep_epoch_finished, acestep_run_ended, note_step

__all__ = [
    "acestep_adapter_saved",
    "acestep_epoch_finished",
    "acestep_model_chosen",
    "acestep_options",
    "acestep_plan_memory",
    "acestep_prepare_batch",
    "acestep_resume",
    "acestep_run_ended",
    "acestep_run_started",
    "acestep_sample_timesteps",
    "acestep_song_cache",
    "acestep_step_finished",
    "check_base_weights",
    "check_compile",
    "check_song_values",
    "decide_cache",
    "keep_resume_state",
    "note_step",
    "plan_base_weights",
    "plan_compiling",
    "say_crops",
]


@hookimpl
def acestep_options() -> list[click.Option]:
    return [
        *model_treatment.options(),
        *nan_masking.options(),
        *crops.options(),
        *adapter_metadata.options(),
        *memory.options(),
        *song_cache.options(),
        *quantization.options(),
        *compiling.options(),
    ]
