"""Makes every saved adapter say what it is and how to generate with it.

The facts go into ``training_config.json`` beside the weights and into the header of the weights themselves, where a
file that is moved or renamed keeps them; the trainer's local paths go out of what PEFT and upstream wrote. With
``--export comfyui`` a copy that ComfyUI plays at the trained strength lies beside each adapter.
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

from .adapter_facts import describe_adapter
from .model_treatment import other_sampler, treatment_of


def options() -> list[click.Option]:
    """What can be said about the adapter."""
    line = Line()
    return [
        click.Option(["--title"], type=line, help="Name of the adapter. [default: LoRA or LoKr for MODEL]"),
        click.Option(["--author"], type=line, help="Who made it."),
        click.Option(["--trigger"], type=line, help="Words for the prompt that call up what it has learned."),
        click.Option(["--license"], type=line, help="Under which terms it may be used, such as CC-BY-4.0."),
        click.Option(
            ["--export"],
            type=click.Choice(["comfyui"]),
            help="Save beside every adapter a copy for this program, which plays at the trained strength there.",
        ),
    ]


@hookimpl
def acestep_adapter_saved(run: Run, saved: SavedAdapter) -> list[str] | None:
    facts = describe_adapter(run, saved, treatment_of(run), other_sampler(run))
    folder = saved.weights.parent
    try:
        write_training_config(folder, facts)
        forget_folders(folder, facts["model_name"])
        if saved.weights.suffix == ".safetensors":  # the first versions of upstream may fall back to a pickle
            write_header(saved.weights, facts)
            if run.options["export"] == "comfyui":
                write_comfyui_copy(read_adapter(saved.weights), folder / FILE_NAMES[saved.adapter_type], facts)
    except Refusal as refusal:
        told = str(refusal).replace(str(saved.weights), str(saved.destination))
        return [f"Warning: no copy for ComfyUI was written. {told}"]
    except OSError as error:
        # The weights are there, as upstream wrote them: hours of training do not end because a copy found no room.
        return [
            f"Warning: {saved.destination} could not be described in full: {error.strerror or error}. "
            "Make room on the disk; the next checkpoint is described again."
        ]
    return None
