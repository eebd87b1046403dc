"""``acestep-train demo``: the whole job on the embedded stand-in, by the same code as ``train``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .commands import PluginCommand
from .train import FOLDER, adapter_and_training_options, run_training, settings_from

# Small enough for seconds on a CPU, large enough to reach a checkpoint and the end.
_SETTINGS = {
    "rank": 4,
    "alpha": 8,
    "epochs": 4,
    "batch_size": 2,
    "gradient_accumulation": 1,
    "save_every": 2,
}


@click.command(cls=PluginCommand, default_plugins=("sidestep",))
@click.option(
    "--model", type=click.Choice(["base", "sft", "turbo"]), default="base", show_default=True, help="Kind of model."
)
@click.option(
    "--dir",
    "directory",
    type=FOLDER,
    default=Path("acestep-demo"),
    show_default=True,
    help="Folder for the stand-in, its songs and the adapter.",
)
@adapter_and_training_options
def demo(
    model: str,
    directory: Path,
    adapter_type: str,
    plugins: tuple[str, ...],
    wins: str | None,
    options: dict[str, Any],
    **settings: Any,
) -> None:
    """Run the whole job on a tiny stand-in for ACE-Step, on a CPU, in seconds.

    It needs no checkout, no network and no GPU. The stand-in makes no music: it shows what happens to each kind of
    model, and where things end up. Everything else is the code that trains on a real checkout, with the plugin
    sidestep unless another is named.

    \b
    Example:
        acestep-train demo --model turbo
    """
    import torch

    from sidestep_plugin.miniature import build
    from sidestep_plugin.trainer.launch import Request, check_writable

    from .progress import echo

    torch.set_num_threads(1)  # a model this small only waits for a second thread
    check_writable(directory.absolute())
    echo("This is a stand-in for ACE-Step 1.5: random tensors instead of songs, and it makes no music.")
    miniature = build(directory)
    output = directory / "output" / f"{model}-{adapter_type}"
    run_training(
        Request(
            model=model,
            dataset_dir=miniature.tensors,
            output_dir=output,
            adapter_type="lokr" if adapter_type == "lokr" else "lora",
            acestep_root=miniature.root,
            settings=_SETTINGS | settings_from(settings),
            plugins=plugins,
            wins=wins,
            options=options,
            device="cpu",
            overwrite=True,
        )
    )
    echo(f"What it says about itself: acestep-train inspect {output}")
