"""``acestep-train demo``: the whole job on the embedded stand-in, by the same code as ``train``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .commands import PluginCommand
from .training_options import FOLDER, GROUPS, adapter_and_training_options, settings_from

if TYPE_CHECKING:
    from sidestep_plugin.miniature import Miniature

# Small enough for seconds on a CPU, large enough to reach a checkpoint, and a loss that has clearly fallen.
_SETTINGS = {
    "rank": 4,
    "alpha": 8,
    "epochs": 4,
    "batch_size": 2,
    "gradient_accumulation": 1,
    "save_every": 2,
    "learning_rate": 0.01,
    "warmup_steps": 0,
}


_SHOWN = (
    *("variant", "timestep_mode", "cfg_ratio", "shift", "num_inference_steps", "crop_seconds"),
    *("validate", "validate_every", "patience", "max_steps", "time_limit", "keep_last"),
    *("preview_every", "preview_songs", "preview_seconds", "title", "author", "trigger", "license", "export"),
)
"""The plugin's options that say something on a stand-in, for its help. The others work as well."""


@click.command(cls=PluginCommand, groups=GROUPS, shows=_SHOWN)
@click.option(
    "--model", type=click.Choice(["base", "sft", "turbo"]), default="base", show_default=True, help="Kind of model."
)
@click.option(
    "--dir",
    "directory",
    type=FOLDER,
    metavar="DIR",
    default=Path("acestep-demo"),
    show_default=True,
    help="Folder for the stand-in, its songs and the adapter.",
)
@click.option(
    "--songs", "from_audio", is_flag=True, help="Start from wav files that are made on the spot, and end with clips."
)
@adapter_and_training_options(_SETTINGS)
def demo(
    model: str,
    directory: Path,
    from_audio: bool,
    adapter_type: str,
    plugins: tuple[str, ...],
    wins: str | None,
    options: dict[str, Any],
    **settings: Any,
) -> None:
    """Run the whole job on a tiny stand-in for ACE-Step, on a CPU, in seconds.

    It needs no checkout, no network and no GPU. The stand-in makes no music: it shows what happens to each kind of
    model, and where things end up. Everything else is the code that trains on a real checkout.

    \b
    Examples:
        acestep-train demo --model turbo
        acestep-train demo --songs
    """
    from .training import run_training, say_that_torch_is_imported

    say_that_torch_is_imported()
    import torch

    from sidestep_plugin.launch.launch import Request, check_writable
    from sidestep_plugin.miniature import build

    from .command_line import quoted
    from .terminal import program, say

    torch.set_num_threads(1)  # a model this small only waits for a second thread
    check_writable(directory.absolute())
    made_up = "a few plain tones" if from_audio else "made-up tensors"
    say(f"This is a stand-in for ACE-Step 1.5: its songs are {made_up}, and it makes no music.")
    miniature = build(directory, encoders=from_audio)
    songs = miniature.tensors
    if from_audio:
        songs = _prepared(miniature, directory, model)
        if "preview_every" in options:
            epochs = settings_from(settings).get("epochs", _SETTINGS["epochs"])
            options = {**options, "preview_every": options["preview_every"] or epochs}
    output = directory / "output" / f"{model}-{adapter_type}"
    again = (output / "final").is_dir()
    run_training(
        Request(
            model=model,
            dataset_dir=songs,
            output_dir=output,
            adapter_type=adapter_type,
            acestep_root=miniature.root,
            settings=_SETTINGS | settings_from(settings),
            plugins=plugins,
            wins=wins,
            options=options,
            device="cpu",
            overwrite=True,
        )
    )
    if again:
        say("It has replaced the earlier demo in that folder.")
    if (losses := _losses(output)) is not None:
        say(f"Mean loss: {losses[0]:.4f} in the first epoch, {losses[1]:.4f} in the last.")
    say(f"See what the adapter says about itself: {quoted([program(), 'inspect', str(output)])}")


def _prepared(miniature: Miniature, directory: Path, model: str) -> Path:
    """Make wav files and prepare them by the code of ``prepare``. Returns the folder of songs."""
    from sidestep_plugin.miniature import write_audio
    from sidestep_plugin.preparing.request import PrepareRequest

    from .command_line import quoted
    from .prepare import run_prepare
    from .terminal import program, say

    audio = write_audio(directory / "audio", seconds=10.0)
    songs = directory / "songs"
    say(f"Four wav files with their texts: {audio}")
    words = [program(), "prepare", str(audio), "--model", model, "--output", str(songs)]
    say("  " + quoted([*words, "--acestep-root", str(miniature.root)]))
    run_prepare(PrepareRequest(audio.absolute(), model, songs.absolute(), acestep_root=miniature.root, device="cpu"))
    return songs


def _losses(output: Path) -> tuple[float, float] | None:
    """The mean losses of the first and the last epoch from a training's report; None when there is none."""
    from sidestep_plugin.files import read_json_object

    try:
        epochs = read_json_object(output / "training_report.json")["loss_by_epoch"]
        return float(epochs[0]["loss"]), float(epochs[-1]["loss"])
    except (OSError, ValueError, TypeError, LookupError):
        return None
