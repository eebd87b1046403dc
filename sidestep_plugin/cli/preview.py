"""``acestep-train preview``: clips from a saved adapter, to listen to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sidestep_plugin.errors import Refusal
from sidestep_plugin.options import FiniteFloat, Line, Place, WholeNumber
from sidestep_plugin.text import shown

from .commands import Command, Unusable, check_plugins
from .quiet import quiet_third_parties, quiet_upstream
from .terminal import echo
from .torch_here import require_torch
from .training_options import ACESTEP_ROOT, CHECKPOINT_DIR, FOLDER, STRENGTHS, check_device, plugin_option

if TYPE_CHECKING:
    from sidestep_plugin.previews.prompts import Prompt


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
@click.option("--prompt", type=Line(), metavar="TEXT", help="What it is to sound like: a prompt instead of songs.")
@click.option("--lyrics", type=Place(path_type=Path), metavar="FILE", help="With --prompt: a text file with lyrics.")
@click.option("--language", type=Line(), metavar="CODE", help="With --prompt: language of the lyrics, such as en.")
@click.option("--bpm", type=FiniteFloat(1.0, 1000.0), metavar="N", help="With --prompt: beats per minute.")
@click.option("--key", type=Line(), metavar="KEY", help='With --prompt: key, such as "A minor".')
@click.option("--time-signature", type=Line(), metavar="N", help="With --prompt: time signature: 2, 3, 4 or 6.")
@click.option("--without", is_flag=True, help="With --prompt: the model without the adapter, too.")
@click.option(
    "--seconds",
    type=FiniteFloat(0.0, 600.0, min_open=True),
    metavar="S",
    help="Length of a clip, at most the song's.  [default: 20, of a prompt 30]",
)
@click.option("--cfg", type=FiniteFloat(1.0, 30.0), metavar="X", help="Guidance scale.  [default: 7, turbo none]")
@click.option("--seed", type=WholeNumber(0, 2**32 - 1), metavar="N", help="Seed of the noise.  [default: 42]")
@STRENGTHS
@click.option(
    "--device",
    default="auto",
    show_default=True,
    callback=check_device,
    metavar="DEVICE",
    help="auto, cpu, cuda, cuda:N, mps or xpu.",
)
@plugin_option()
def preview(
    path: Path,
    plugin: tuple[str, ...],
    prompt: str | None,
    lyrics: Path | None,
    language: str | None,
    bpm: float | None,
    key: str | None,
    time_signature: str | None,
    **asked: Any,
) -> None:
    """Generate clips from a saved adapter, beside those of the model without it, and a page that plays them.

    ADAPTER is the folder of a checkpoint, of a finished adapter or of a training. If the training has left its
    previews as latents, and no --dataset-dir is given, these are decoded. In a training's own folder, clips are made
    with the songs and the settings of those that are there. --strengths makes clips at each of several strengths.

    \b
    Examples:
        acestep-train preview adapters/jazz/checkpoints/epoch_20_loss_0.7312 --dataset-dir songs
        acestep-train preview adapters/jazz --prompt "late night jazz, brushes" --without
        acestep-train preview adapters/jazz --dataset-dir songs --strengths 0.6,0.8,1,1.2
    """
    from sidestep_plugin.previews.clips import ClipRequest, decode_saved, make_clips
    from sidestep_plugin.previews.table import read_table

    quiet_third_parties()
    quiet_upstream()
    said = {"language": language, "bpm": bpm, "key": key, "time_signature": time_signature}
    try:
        check_plugins(plugin, "clips are generated as the model generates")
        require_torch()
        request = ClipRequest(path, prompt=_prompt(prompt, lyrics, said, asked), **asked)
        folder = decode_saved(request, echo) or make_clips(request, echo)
        page = _on_a_page(folder)
    except Refusal as refusal:
        raise Unusable(shown(refusal, 5000)) from None
    except OSError as error:
        where = error.filename or asked["output"] or path
        raise Unusable(f"Cannot write the clips: {error.strerror or error}: {where}.") from None
    table = read_table(folder)
    told = "Clips, as latents that nobody can hear yet" if table is not None and any(table.undecoded) else "Listen"
    echo(f"{told}: {page}")


def _on_a_page(folder: Path) -> Path:
    """Put the clips of a folder on the page that plays them. Returns the page. Raises Refusal or OSError."""
    from sidestep_plugin.previews.table import read_table
    from sidestep_plugin.report.page import show_clips

    table = read_table(folder)
    assert table is not None  # it was written just now
    return show_clips(folder, table.as_report())


def _prompt(caption: str | None, lyrics: Path | None, said: dict[str, Any], asked: dict[str, Any]) -> Prompt | None:
    """The prompt of the command line; None without one. Raises Refusal."""
    from sidestep_plugin.previews.prompts import prompt_of, read_lyrics

    values = {name: value for name, value in said.items() if value is not None}
    if caption is None:
        extra = ["lyrics"] * (lyrics is not None) + list(values) + ["without"] * bool(asked["without"])
        if extra:
            raise click.UsageError(f"--{extra[0].replace('_', '-')} belongs to a prompt. Say what: --prompt TEXT.")
        return None
    if asked["dataset_dir"] is not None or asked["songs"] is not None:
        raise click.UsageError("--prompt generates from a prompt, --dataset-dir from songs. Leave one of them out.")
    values["caption"] = caption
    if lyrics is not None:
        values["lyrics"] = read_lyrics(lyrics)
    if asked["seconds"] is not None:
        values["seconds"] = asked["seconds"]
    return prompt_of(values, "The command line")
