"""``acestep-train export``: copies an adapter for another program."""

from __future__ import annotations

from pathlib import Path

import click

from sidestep_plugin.errors import Refusal
from sidestep_plugin.files import special_kind
from sidestep_plugin.options import FiniteFloat, Place
from sidestep_plugin.text import shown

from .commands import Unusable
from .training_options import ACESTEP_ROOT, CHECKPOINT_DIR


@click.command()
@click.argument("adapter", type=Place(path_type=Path))
@click.option("--to", "program", type=click.Choice(["comfyui"]), required=True, help="Program to export for.")
@click.option(
    "--output",
    type=Place(path_type=Path),
    help="File to write, or folder to write it into. [default: comfyui_lora.safetensors beside the adapter]",
)
@click.option(
    "--alpha",
    type=FiniteFloat(0.0, min_open=True),
    help="Alpha that the LoRA was trained with, if its files do not have it.",
)
@click.option(
    "--model",
    metavar="NAME|DIR",
    help="Model that it was trained on: base, sft, turbo, ..., or a path. Only for a LoKr with weight decomposition.",
)
@ACESTEP_ROOT
@CHECKPOINT_DIR
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
def export(
    adapter: Path,
    program: str,
    output: Path | None,
    alpha: float | None,
    model: str | None,
    acestep_root: Path | None,
    checkpoint_dir: Path | None,
    overwrite: bool,
) -> None:
    """Copy an adapter so that it works in another program at full strength.

    ComfyUI reads a LoRA's alpha only from tensors that PEFT does not write, so it applies ACE-Step's LoRAs with
    strength 1 instead of alpha / rank. The copy has these tensors, and the facts about the adapter. Layers that change
    nothing are left out. The adapter itself is not changed.

    \b
    Example:
        acestep-train export adapters/jazz/final --to comfyui --output ComfyUI/models/loras/jazz.safetensors
    """
    assert program == "comfyui"
    from sidestep_plugin.adapters.base_weights import weights_in_folder
    from sidestep_plugin.adapters.comfyui import FILE_NAMES, check_exportable, write_comfyui_copy
    from sidestep_plugin.adapters.inspection import inspect_adapter

    try:
        report = inspect_adapter(adapter)
        if report.problems:
            raise Refusal(f"{report.adapter.file.path} was not exported: {report.problems[0]}")
        source = report.adapter
        if alpha is not None:
            for layer in source.layers.values():
                if layer.alpha is not None and layer.alpha != alpha:
                    raise Refusal(f"{source.file.path} already has alpha {layer.alpha:g}. Leave --alpha out.")
                layer.alpha = alpha
        base = None if model is None else weights_in_folder(_model_folder(model, acestep_root, checkpoint_dir))
        check_exportable(source, base)
        target = output or source.file.path.parent
        if target.is_dir():
            target /= FILE_NAMES[source.kind]
        if (kind := special_kind(target)) is not None:
            raise Refusal(f"{target} is a {kind}, and only regular files are replaced. Choose another --output.")
        if target.exists() and target.samefile(source.file.path):
            raise Refusal(f"{target} is the adapter itself. Choose another --output.")
        if target.exists() and not overwrite:
            raise Refusal(f"{target} already exists. Choose another --output, or use --overwrite.")
        ours = report.written_by.startswith("sidestep-plugin")
        left_out = write_comfyui_copy(source, target, report.facts if ours else None, base)
    except Refusal as refusal:
        raise Unusable(shown(refusal, 5000)) from None
    except OSError as error:
        raise Unusable(f"Cannot write the copy: {error.strerror or error}: {error.filename or output}.") from None
    click.echo(f"ComfyUI copy: {shown(target, 5000)}")
    if left_out and left_out == len(source.idle):
        noun = "layer that holds only zeros and changes" if left_out == 1 else "layers that hold only zeros and change"
        click.echo(f"Left out: {left_out} {noun} nothing.")
    elif left_out:
        click.echo(f"Left out: {left_out} {'layer that was' if left_out == 1 else 'layers that were'} not trained.")
    click.echo("Put it into ComfyUI/models/loras and load it with strength 1.0.")
    if (generate := report.generate).shift is not None and not generate.guess:
        click.echo(f"Generate with shift {generate.shift}, {generate.num_inference_steps} steps, CFG {generate.cfg}.")


def _model_folder(model: str, root: Path | None, checkpoints: Path | None) -> Path:
    """The folder of a base model. Raises Refusal."""
    from sidestep_plugin.engine.checkout import find_root
    from sidestep_plugin.engine.models import checkpoint_folder, find_model

    if checkpoints is None and Path(model).is_dir():
        return Path(model).absolute()
    return find_model(model, checkpoint_folder(None, find_root(root)) if checkpoints is None else checkpoints)
