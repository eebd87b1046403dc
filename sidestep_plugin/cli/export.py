"""``acestep-train export``: copies an adapter for another program."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sidestep_plugin.errors import Refusal
from sidestep_plugin.files import special_kind
from sidestep_plugin.options import FiniteFloat, Place
from sidestep_plugin.text import counted, shown

from .commands import Unusable
from .terminal import echo
from .training_options import ACESTEP_ROOT, CHECKPOINT_DIR

if TYPE_CHECKING:
    from sidestep_plugin.adapters.base_weights import BaseWeights
    from sidestep_plugin.adapters.inspection import Report


@click.command()
@click.argument("adapter", type=Place(path_type=Path))
@click.option(
    "--to", "program", type=click.Choice(["comfyui", "universal"]), required=True, help="Program to export for."
)
@click.option(
    "--output",
    type=Place(path_type=Path),
    help="File or folder to write. [default: comfyui_lora.safetensors, or a folder, beside the adapter]",
)
@click.option(
    "--alpha",
    type=FiniteFloat(0.0, min_open=True),
    help="Alpha that the LoRA was trained with, if its files do not have it.",
)
@click.option(
    "--strength",
    type=FiniteFloat(-10.0, 10.0),
    default=1.0,
    help="Multiply the copy by this, so that it plays like that at strength 1. [default: 1]",
)
@click.option(
    "--model",
    metavar="NAME|DIR",
    help="Model that it was trained on: base, sft, turbo, ..., or a path. Only for a LoKr with weight decomposition.",
)
@ACESTEP_ROOT
@CHECKPOINT_DIR
@click.option("--overwrite", is_flag=True, help="Replace an existing copy.")
def export(
    adapter: Path,
    program: str,
    output: Path | None,
    alpha: float | None,
    strength: float,
    model: str | None,
    acestep_root: Path | None,
    checkpoint_dir: Path | None,
    overwrite: bool,
) -> None:
    """Copy an adapter so that it works in another program at full strength.

    comfyui: ComfyUI reads a LoRA's alpha only from tensors that PEFT does not write, so it applies ACE-Step's LoRAs
    with strength 1 instead of alpha / rank. The copy has these tensors.

    universal: a LoRA whose strength is in its weights, with alpha = rank, so that every program plays it in full:
    ACE-Step, PEFT, diffusers, ComfyUI, acestep.cpp, HOT-Step, Wan2GP and DEMON. With an --output that ends in
    .safetensors it is a single file, else a folder, which ACE-Step and PEFT need.

    A copy has the facts about the adapter. Layers that change nothing are left out. The adapter itself is not changed.

    \b
    Examples:
        acestep-train export adapters/jazz/final --to comfyui --output ComfyUI/models/loras/jazz.safetensors
        acestep-train export adapters/jazz/final --to universal --output share/jazz.safetensors
    """
    from sidestep_plugin.adapters.base_weights import weights_in_folder
    from sidestep_plugin.adapters.facts import better_than
    from sidestep_plugin.adapters.inspection import inspect_adapter

    try:
        report = inspect_adapter(adapter)
        source = report.adapter
        if report.problems:
            raise Refusal(f"{source.file.path} was not exported: {report.problems[0]}")
        if strength == 0.0:
            raise Refusal("--strength 0 would make a copy that changes nothing. Choose another one.")
        if alpha is not None:
            for layer in source.layers.values():
                if layer.alpha is not None and layer.alpha != alpha:
                    raise Refusal(f"{source.file.path} already has alpha {layer.alpha:g}. Leave --alpha out.")
                layer.alpha = alpha
        if program == "universal":
            lines = _universal(report, output, strength, overwrite)
        else:
            base = None if model is None else weights_in_folder(model_folder(model, acestep_root, checkpoint_dir))
            lines = _comfyui(report, output, strength, base, overwrite)
    except Refusal as refusal:
        raise Unusable(shown(refusal, 5000)) from None
    except OSError as error:
        raise Unusable(f"Cannot write the copy: {error.strerror or error}: {error.filename or output}.") from None
    for line in lines:
        echo(line)
    if better := better_than(report.adapter.file.path):
        echo(f"Note: {shown(better, 5000)}")
    if (generate := report.generate).shift is not None and not generate.guess:
        steps = counted(generate.num_inference_steps, "step")
        echo(f"Generate with shift {generate.shift}, {steps}, CFG {generate.cfg}.")


def _comfyui(
    report: Report, output: Path | None, strength: float, base: BaseWeights | None, overwrite: bool
) -> list[str]:
    """Write a copy for ComfyUI. Returns what to print. Raises Refusal."""
    from sidestep_plugin.adapters.comfyui import FILE_NAMES, check_exportable, write_comfyui_copy

    source = report.adapter
    check_exportable(source, base)
    target = output or source.file.path.parent
    if target.is_dir():
        target /= FILE_NAMES[source.kind]
    _check_file(target, source.file.path, overwrite)
    ours = report.written_by.startswith("sidestep-plugin")
    left_out = write_comfyui_copy(source, target, report.facts if ours else None, base, strength)
    lines = [f"ComfyUI copy: {shown(target, 5000)}"]
    if left_out and left_out == len(source.idle):
        noun = "layer that holds only zeros and changes" if left_out == 1 else "layers that hold only zeros and change"
        lines.append(f"Left out: {left_out} {noun} nothing.")
    elif left_out:
        lines.append(f"Left out: {left_out} {'layer that was' if left_out == 1 else 'layers that were'} not trained.")
    return [*lines, "Put it into ComfyUI/models/loras and load it with strength 1.0."]


def _universal(report: Report, output: Path | None, strength: float, overwrite: bool) -> list[str]:
    """Write a universal copy. Returns what to print. Raises Refusal."""
    from sidestep_plugin.adapters.kinds import WEIGHT_NAMES
    from sidestep_plugin.adapters.universal import check_universal, notes, write_universal

    source = report.adapter
    check_universal(source)
    place = source.file.path.absolute().parent
    target = output or (place.parent if place.name == "adapter" else place) / _name_of(place)
    if target.suffix == ".safetensors":
        if target.is_dir():
            raise Refusal(f"{target} is a folder. Choose another --output.")
        _check_file(target, source.file.path, overwrite)
        if (target.parent / "adapter_config.json").exists():
            raise Refusal(
                f"{target.parent} has an adapter_config.json, from which acestep.cpp takes the alpha of every file in "
                "the folder. Choose an --output elsewhere."
            )
    elif target.absolute() == place or (not overwrite and any((target / name).exists() for name in WEIGHT_NAMES)):
        raise Refusal(f"There is an adapter in {target}. Choose another --output, or use --overwrite.")
    left_out, became = write_universal(source, target, report.facts, strength)
    lines = [f"Universal copy: {shown(target, 5000)}"]
    if left_out:
        noun = "layer that holds only zeros and changes" if left_out == 1 else "layers that hold only zeros and change"
        lines.append(f"Left out: {left_out} {noun} nothing.")
    if became:
        lines.append("Its tensors are fp32: with the strength multiplied in, 16 bits would round them.")
    lines += [f"Note: {note}" for note in notes(source)]
    return [*lines, "Load it with strength 1.0."]


def _name_of(place: Path) -> str:
    """A name for the copy of an adapter in a folder: that of its training, so that the app can load two of them.

    ACE-Step's app calls an adapter by its folder, takes a name only once, and PEFT takes none with a dot.
    """
    saved = place.parent if place.name == "adapter" else place
    if saved.name in ("final", "interrupted"):
        name = saved.parent.name
    elif saved.parent.name == "checkpoints":
        name = f"{saved.parent.parent.name}-{saved.name.partition('_loss_')[0]}"
    else:
        return "universal"
    return re.sub(r"[^\w-]+", "_", name).strip("_") or "universal"


def _check_file(target: Path, source: Path, overwrite: bool) -> None:
    if (kind := special_kind(target)) is not None:
        raise Refusal(f"{target} is a {kind}, and only regular files are replaced. Choose another --output.")
    if target.exists() and target.samefile(source):
        raise Refusal(f"{target} is the adapter itself. Choose another --output.")
    if target.exists() and not overwrite:
        raise Refusal(f"{target} already exists. Choose another --output, or use --overwrite.")


def model_folder(model: str, root: Path | None, checkpoints: Path | None) -> Path:
    """The folder of a base model. Raises Refusal."""
    from sidestep_plugin.engine.checkout import find_root
    from sidestep_plugin.engine.models import checkpoint_folder, find_model

    if checkpoints is None and Path(model).is_dir():
        return Path(model).absolute()
    return find_model(model, checkpoint_folder(None, find_root(root)) if checkpoints is None else checkpoints)
