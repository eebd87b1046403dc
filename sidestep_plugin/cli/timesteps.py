"""``acestep-train timesteps``: the distribution of training timesteps, as text and as a picture."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from sidestep_plugin.options import Place, WholeNumber

from .commands import PluginCommand, echo_json
from .plotting import check_plot
from .terminal import echo
from .torch_here import require_torch
from .training_options import ACESTEP_ROOT, CHECKPOINT_DIR, WINS, plugin_option


@click.command(cls=PluginCommand, shows=("variant", "timestep_mode"))
@click.option("--model", required=True, metavar="NAME|DIR", help="Model: base, sft, turbo, xl-base, ..., or a path.")
@ACESTEP_ROOT
@CHECKPOINT_DIR
@click.option(
    "--draws",
    type=WholeNumber(1000, 10_000_000),
    metavar="N",
    default=100_000,
    show_default=True,
    help="Timesteps to draw, at least 1000.",
)
@click.option(
    "--bands",
    type=WholeNumber(4, 100),
    metavar="N",
    default=20,
    show_default=True,
    help="Rows of the table, from 4 to 100.",
)
@click.option("--seed", type=WholeNumber(0, 2**63 - 1), metavar="N", default=42, show_default=True, help="Random seed.")
@click.option("--plot", type=Place(path_type=Path), metavar="FILE.png", help="Also draw a picture; needs matplotlib.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@plugin_option()
@WINS
@click.option("--debug", is_flag=True, help="Show where an error came from.")
def timesteps(
    model: str,
    acestep_root: Path | None,
    checkpoint_dir: Path | None,
    draws: int,
    bands: int,
    seed: int,
    plot: Path | None,
    as_json: bool,
    plugins: tuple[str, ...],
    wins: str | None,
    options: dict[str, Any],
) -> None:
    """Show at which timesteps a model is trained: by ACE-Step alone, by the model's own law, and with the plugin.

    Only the model's config.json is read. The plugin's timesteps are drawn from it by the code that trains.

    \b
    Example:
        acestep-train timesteps --model base --plot timesteps.png
    """
    require_torch()
    import torch

    from sidestep_plugin.engine.models import checkpoints_of, find_model
    from sidestep_plugin.engine.rehearsal import rehearse
    from sidestep_plugin.registry import Registry
    from sidestep_plugin.run import ModelFacts
    from sidestep_plugin.timesteps import shares
    from sidestep_plugin.timesteps.schedule import inference_timesteps
    from sidestep_plugin.timesteps.treatment import law_of
    from sidestep_plugin.variants import TURBO_SHIFT, TURBO_STEPS

    if plot is not None:
        check_plot(plot)
    registry = Registry.load(plugins, wins)
    folder = find_model(model, checkpoints_of(checkpoint_dir, acestep_root))
    rehearsal = rehearse(registry, folder, registry.resolve_options(options))
    schedule = inference_timesteps(TURBO_SHIFT, TURBO_STEPS)
    torch.manual_seed(seed)
    drawn = rehearsal.timesteps(draws)
    if drawn is None:  # the plugin leaves it to ACE-Step's sampler
        drawn = torch.tensor(schedule)[torch.randint(len(schedule), (draws,))]
    law = law_of(ModelFacts.from_folder(folder))
    columns = [shares.of_the_trainer("ACE-Step's trainer", bands)]
    if law is not None:
        columns.append(shares.of_the_law("the model's own law", *law, bands))
    columns.append(shares.of_values(f"with {', '.join(registry.names)}", drawn.tolist(), bands))
    if plot is not None:
        figure = shares.draw(f"Training timesteps of {folder.name}", schedule, law, drawn, columns[-1].name)
        shares.save_picture(figure, plot)
    if as_json:
        names = ("trainer", "law", "plugins") if law is not None else ("trainer", "plugins")
        echo_json({"model": folder.name, "bands": bands} | {n: vars(c) for n, c in zip(names, columns, strict=True)})
        return
    for line in rehearsal.lines:
        echo(line)
    echo("Share of the training steps by t (1 is pure noise), and the median with the range of 90 %:\n")
    for line in shares.as_text(columns, block=_block()):
        echo(line)
    if plot is not None:
        echo(f"\nPicture: {plot}")


def _block() -> str:
    """A full block if the console can show it, else a plain sign."""
    try:
        "█".encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return "#"
    return "█"
