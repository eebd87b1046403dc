"""``acestep-train preview``: clips from a saved adapter, to listen to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sidestep_plugin.errors import Refusal
from sidestep_plugin.options import FiniteFloat, Line, Place, WholeNumber
from sidestep_plugin.text import shown

from .commands import Command, Unusable
from .quiet import quiet_third_parties, quiet_upstream
from .training_options import ACESTEP_ROOT, CHECKPOINT_DIR, FOLDER, check_device


@click.command(cls=Command)
@click.argument("path", metavar="ADAPTER", type=Place(path_type=Path))
@click.option("--dataset-dir", type=FOLDER, metavar="DIR", help="Folder of preprocessed songs to generate from.")
@click.option("--model", metavar="NAME|DIR", help="Model.  [default: the one that the adapter is for]")
@ACESTEP_ROOT
@CHECKPOINT_DIR
@click.option(
    "--output", type=FOLDER, metavar="DIR", help="Folder for the clips.  [default: previews/ of the training]"
)
@click.option("--songs", type=Line(), metavar="K|NAMES", help="How many songs, or which ones: a,b,c.  [default: 2]")
@click.option(
    "--seconds",
    type=FiniteFloat(0.0, 600.0, min_open=True),
    metavar="S",
    help="Length of a clip, at most the song's.  [default: 20]",
)
@click.option("--cfg", type=FiniteFloat(1.0, 30.0), metavar="X", help="Guidance scale.  [default: 7, turbo none]")
@click.option("--seed", type=WholeNumber(0, 2**32 - 1), metavar="N", help="Seed of the noise.  [default: 42]")
@click.option(
    "--device",
    default="auto",
    show_default=True,
    callback=check_device,
    metavar="DEVICE",
    help="auto, cpu, cuda, cuda:N, mps or xpu.",
)
def preview(path: Path, **asked: Any) -> None:
    """Generate clips from a saved adapter, beside those of the model without it, and a page that plays them.

    ADAPTER is the folder of a checkpoint, of a finished adapter or of a training. If the training has left its
    previews as latents, and no --dataset-dir is given, these are decoded. In a training's own folder, clips are made
    with the songs and the settings of those that are there.

    \b
    Example:
        acestep-train preview adapters/jazz/checkpoints/epoch_20_loss_0.7312 --dataset-dir songs
    """
    from sidestep_plugin.previews.clips import ClipRequest, decode_saved, make_clips

    quiet_third_parties()
    quiet_upstream()
    request = ClipRequest(path, **asked)
    try:
        folder = decode_saved(request, click.echo) or make_clips(request, click.echo)
        page = _on_a_page(folder)
    except Refusal as refusal:
        raise Unusable(shown(refusal, 5000)) from None
    except OSError as error:
        raise Unusable(f"Cannot write the clips: {error.strerror or error}: {error.filename or path}.") from None
    click.echo(f"Listen: {page}")


def _on_a_page(folder: Path) -> Path:
    """Put the clips of a folder on the page that plays them. Returns the page. Raises Refusal or OSError."""
    from sidestep_plugin.previews.table import read_table
    from sidestep_plugin.report.page import show_clips

    table = read_table(folder)
    assert table is not None  # it was written just now
    return show_clips(folder, table.as_report())
