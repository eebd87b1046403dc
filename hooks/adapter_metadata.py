"""Describes every saved adapter: what it is and how to generate with it.

The facts are written into ``training_config.json`` beside the weights, and into the header of the weights, where they
stay if the file is moved or renamed. Local paths are removed from what PEFT and upstream wrote. With
``--export comfyui`` each adapter also gets a copy that works in ComfyUI at full strength.
"""

from __future__ import annotations

import click

from sidestep_plugin import Refusal, hookimpl
from sidestep_plugin.adapters.comfyui import FILE_NAMES, write_comfyui_copy
from sidestep_plugin.adapters.facts import write_training_config
from sidestep_plugin.adapters.header import write_header
from sidestep_plugin.adapters.layers import read_adapter
from sidestep_plugin.adapters.paths import forget_folders
from sidestep_plugin.options import Line
from sidestep_plugin.run import Run, SavedAdapter
from sidestep_plugin.songs.dataset import songs_in
from sidestep_plugin.songs.one_song import caption_of
from sidestep_plugin.text import counted

from .adapter_facts import describe_adapter
from .model_treatment import other_sampler, treatment_of


def options() -> list[click.Option]:
    """Options that describe the adapter."""
    line = Line()
    return [
        click.Option(["--title"], type=line, help="Name of the adapter. [default: LoRA or LoKr for MODEL]"),
        click.Option(["--author"], type=line, help="Author of the adapter."),
        click.Option(["--trigger"], type=line, help="Trigger words: words for the prompt that activate the adapter."),
        click.Option(["--license"], type=line, help="Licence of the adapter, such as CC-BY-4.0."),
        click.Option(
            ["--export"],
            type=click.Choice(["comfyui"]),
            metavar="PROGRAM",
            help="Also save a copy of every adapter for this program: comfyui.",
        ),
    ]


@hookimpl(specname="acestep_run_started")
def say_trigger(run: Run) -> list[str] | None:
    """Say it if a trigger is promised that no caption holds: the adapter cannot have learned it."""
    trigger = run.options["trigger"]
    if trigger is None or run.tensor_dir is None:
        return None
    captions = [caption_of(file) for file in songs_in(run.tensor_dir)]
    known = [caption.casefold() for caption in captions if caption]
    words = [word.strip() for word in trigger.casefold().split(",") if word.strip()]
    unknown = [word for word in words if not any(word in caption for caption in known)]
    if not unknown or len(known) < len(captions):  # nothing is said of songs whose caption is not known
        return None
    return [
        f"Warning: --trigger: no caption of the {counted(len(known), 'song')} holds "
        f"{', '.join(map(repr, unknown))}, so "
        "it will mean nothing to the adapter. Preprocess the songs again with it as their custom tag, or leave it out."
    ]


@hookimpl
def acestep_adapter_saved(run: Run, saved: SavedAdapter) -> list[str] | None:
    facts = describe_adapter(run, saved, treatment_of(run), other_sampler(run))
    folder = saved.weights.parent
    try:
        write_training_config(folder, facts)
        forget_folders(folder, facts["model_name"])
        if saved.weights.suffix == ".safetensors":  # early versions of upstream may save a pickle
            write_header(saved.weights, facts)
            if run.options["export"] == "comfyui":
                write_comfyui_copy(read_adapter(saved.weights), folder / FILE_NAMES[saved.adapter_type], facts)
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
