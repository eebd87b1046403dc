"""The plugin ``sidestep``: what it corrects (the files beside this one), and the list of everything that it brings.

Imports nothing but the names below; a room's plugin imports no torch until a training runs, so that ``--help`` can list
the options at once.
"""

from __future__ import annotations

from typing import Final

PLUGINS: Final = (
    # the corrections
    ("treatment", "sidestep_plugin.hooks.treatment"),  # which variant a model is, and what follows from it
    ("timesteps", "sidestep_plugin.hooks.timesteps"),  # the timesteps that the variant is trained at
    ("adapters", "sidestep_plugin.adapters.plugin"),  # no other adapter in the model, or in what is saved
    ("starting", "sidestep_plugin.resuming.starting"),  # from a finished adapter's weights
    ("songs", "sidestep_plugin.songs.plugin"),  # how the songs were made, and their trigger word
    # where it trains, and in how much memory and time
    ("several_gpus", "sidestep_plugin.several_gpus.plugin"),  # one process for each GPU
    ("base_weights", "sidestep_plugin.memory.base_weights"),  # their type; quantized before they are compiled
    ("idle_layers", "sidestep_plugin.memory.idle_layers"),  # layers of a LoKr that are not trained are bypassed
    ("gradient_checkpointing", "sidestep_plugin.memory.gradient_checkpointing"),  # activations computed twice
    ("compiling", "sidestep_plugin.memory.compiling"),  # the decoder's blocks, as they are now
    ("song_cache", "sidestep_plugin.memory.song_cache"),  # songs stay in RAM
    ("advice", "sidestep_plugin.memory.advice"),  # what to do when memory or disk runs out
    # what is done to a batch; random numbers are drawn in this order
    ("crops", "sidestep_plugin.hooks.crops"),  # a random window of each song: less is left to do for the next ones
    ("nan_masking", "sidestep_plugin.hooks.nan_masking"),  # NaN behind a song's mask becomes zero
    ("condition_dropout", "sidestep_plugin.hooks.condition_dropout"),  # rows without their prompt, for base and sft
    ("pad_masking", "sidestep_plugin.hooks.pad_masking"),  # a song in a batch is told the same as alone
    # what looks at a training and changes nothing
    ("averaging", "sidestep_plugin.averaging.plugin"),  # a running mean of the adapter, saved beside it
    ("validation", "sidestep_plugin.validation.plugin"),  # the loss on held-out songs
    ("previews", "sidestep_plugin.previews.plugin"),  # clips to listen to
    ("loss_watch", "sidestep_plugin.report.loss_watch"),  # a loss that is NaN for good ends the training
    ("limits", "sidestep_plugin.resuming.limits"),  # how many steps, and for how long
    ("report", "sidestep_plugin.report.plugin"),  # losses by epoch and by timestep
    # what is saved
    ("metadata", "sidestep_plugin.hooks.metadata"),  # what every adapter says about itself
    ("resuming", "sidestep_plugin.resuming.plugin"),  # checkpoints that a training resumes from
    ("keeping", "sidestep_plugin.resuming.keeping"),  # how many of them stay
)
"""Name and module of each part, in the order in which the parts are asked. The order is part of the product."""
