"""Describes every saved adapter: what it is and how to generate with it.

The facts are written into ``training_config.json`` beside the weights, and into the header of the weights, where they
stay if the file is moved or renamed. Local paths are removed from what PEFT and upstream wrote. With
``--export comfyui`` each adapter also gets a copy that works in ComfyUI at full strength.
"""

from __future__ import annotations

from functools import partial

import click

from sidestep_plugin import Refusal, hookimpl
from sidestep_plugin.adapters.base_weights import weights_of_model
from sidestep_plugin.adapters.card import write_card
from sidestep_plugin.adapters.comfyui import FILE_NAMES, write_comfyui_copy
from sidestep_plugin.adapters.facts import read_training_config, write_training_config
from sidestep_plugin.adapters.header import write_header
from sidestep_plugin.adapters.layers import read_adapter
from sidestep_plugin.adapters.paths import forget_folders
from sidestep_plugin.options import Line, option
from sidestep_plugin.run import Run, SavedAdapter
from sidestep_plugin.timesteps.treatment import other_sampler, treatment_of

from .facts import describe_adapter, describe_run, songs_of


@hookimpl
def acestep_options() -> list[click.Option]:
    """Options that describe the adapter."""
    line, programs = Line(), click.Choice(["comfyui"])
    return [
        option("--title", "Name of the adapter. [default: LoRA or LoKr for MODEL]", line),
        option("--author", "Author of the adapter.", line),
        option("--trigger", "Trigger words: words for the prompt that activate the adapter.", line),
        option("--license", "Licence of the adapter, such as CC-BY-4.0.", line),
        option("--export", "Also save a copy of every adapter for this program: comfyui.", programs, "PROGRAM"),
    ]


@hookimpl
def acestep_run_started(run: Run) -> None:
    songs_of(run)
    run.describe = partial(describe_run, run, treatment_of(run), other_sampler(run))


@hookimpl
def acestep_adapter_saved(run: Run, saved: SavedAdapter) -> list[str] | None:
    facts = describe_adapter(run, saved, treatment_of(run), other_sampler(run))
    if saved.copy_of is not None and (known := read_training_config(saved.copy_of)) is not None:
        # How it was trained is in the checkpoint: a resumed run may have other settings.
        facts = known | {name: facts[name] for name in ("title", "author", "trigger", "license", "created")}
    folder = saved.weights.parent
    try:
        write_training_config(folder, facts)
        forget_folders(folder, facts["model_name"])
        write_card(folder, facts)
        if saved.weights.suffix == ".safetensors":  # early versions of upstream may save a pickle
            write_header(saved.weights, facts)
            if run.options["export"] == "comfyui":
                copy = folder / FILE_NAMES[saved.adapter_type]
                write_comfyui_copy(read_adapter(saved.weights), copy, facts, weights_of_model(run.model))
    except Refusal as refusal:
        told = str(refusal).replace(str(saved.weights), str(saved.destination))
        return [f"Warning: no copy for ComfyUI was written. {told}"]
    except OSError as error:
        # Upstream has saved the weights. Hours of training must not end because the disk is too full to describe them.
        return [
            f"Warning: {saved.destination} was saved, but not all facts about it: {error.strerror or error}. "
            "Free some disk space. The next checkpoint will be described again."
        ]
    return None
