"""``acestep-train publish``: a folder of an adapter that can be shared."""

from __future__ import annotations

import re
from pathlib import Path

import click

from sidestep_plugin.errors import Refusal
from sidestep_plugin.options import Place
from sidestep_plugin.text import shown

from .commands import Command, Unusable
from .terminal import echo
from .training_options import ACESTEP_ROOT, CHECKPOINT_DIR


@click.command(cls=Command)
@click.argument("adapter", type=Place(path_type=Path))
@click.option("--output", type=Place(path_type=Path), required=True, metavar="DIR", help="Folder to make.")
@click.option("--name", metavar="NAME", help="What the files are called.  [default: from the title, or the folder]")
@click.option(
    "--clip", "clips", type=Place(path_type=Path), multiple=True, metavar="FILE", help="A clip to take along."
)
@click.option("--previews", is_flag=True, help="Take the clips along that the training's previews have of it.")
@click.option("--model", metavar="NAME|DIR", help="Its base model. Only for a LoKr with weight decomposition.")
@ACESTEP_ROOT
@CHECKPOINT_DIR
@click.option("--overwrite", is_flag=True, help="Replace what is in the folder.")
def publish(
    adapter: Path,
    output: Path,
    name: str | None,
    clips: tuple[Path, ...],
    previews: bool,
    model: str | None,
    acestep_root: Path | None,
    checkpoint_dir: Path | None,
    overwrite: bool,
) -> None:
    """Make a folder of an adapter that can be shared, as on Hugging Face.

    It holds the adapter as it was trained, a copy for all other programs, a card (README.md), the options of the
    training, and clips that are named or, with --previews, those of the training. No path, no name of this machine and
    no name of a song is in it. Nothing is uploaded, and the adapter is not changed.

    \b
    Example:
        acestep-train publish adapters/jazz/final --output share/jazz
    """
    from sidestep_plugin.adapters.base_weights import weights_in_folder
    from sidestep_plugin.adapters.inspection import inspect_adapter
    from sidestep_plugin.adapters.kinds import BY_NAME, DEFAULT
    from sidestep_plugin.adapters.publishing import publish as make
    from sidestep_plugin.previews.clips import clips_of

    from .export import model_folder

    try:
        report = inspect_adapter(adapter)
        if report.problems:
            raise Refusal(f"{report.adapter.file.path} was not published: {report.problems[0]} Mend that first.")
        if report.adapter.kind not in BY_NAME:
            raise Refusal(f"{report.adapter.file.path} is a {report.adapter.kind}. Choose a LoRA or a LoKr.")
        called = name or _name_of(str(report.facts.get("title") or ""), adapter)
        if not re.fullmatch(r"[A-Za-z0-9][\w-]{0,79}", called, flags=re.ASCII):
            raise Refusal(f"--name {shown(called, 100)}: expected letters, digits, - and _. PEFT allows no dot.")
        if output.exists() and not output.is_dir():
            raise Refusal(f"{output} is no folder. Choose another --output.")
        if output.is_dir() and any(output.iterdir()) and not overwrite:
            raise Refusal(f"{output} is not empty. Choose another --output, or use --overwrite.")
        if previews:
            clips += tuple(clips_of(report))
        base = None if model is None else weights_in_folder(model_folder(model, acestep_root, checkpoint_dir))
        files = make(report.adapter, report.facts, output.absolute(), called, clips=clips, base=base)
    except Refusal as refusal:
        raise Unusable(shown(refusal, 5000)) from None
    except OSError as error:
        raise Unusable(f"Cannot write the folder: {error.strerror or error}: {error.filename or output}.") from None
    echo(f"Made: {shown(output, 5000)}")
    width = max(len(file) for file, _ in files)
    for file, what in files:
        echo(f"  {file:<{width}}  {what}")
    if not any(file == f"{called}.safetensors" for file, _ in files):
        exact = "an exact one needs the base model: name it with --model"
        why = "it is a DoRA" if report.adapter.kind == DEFAULT.name else exact
        echo(f"No copy for other programs: {why}.")
    missing = [word for word, key in (("a licence", "license"), ("an author", "author")) if not report.facts.get(key)]
    if missing:
        echo(f"The card has no {' and no '.join(word.split()[1] for word in missing)}: add it in README.md.")


def _name_of(title: str, adapter: Path) -> str:
    """A name for the files: from the title, unless it is the default one, else of the file or the training's folder."""
    usual = ("final", "adapter", "average", "checkpoints", "best", adapter.absolute().anchor)
    names = [name for name in adapter.absolute().parts if name not in usual]
    words = names[-1].removesuffix(".safetensors") if not title or re.match(r"(LoRA|LoKr) for ", title) else title
    return re.sub(r"[^A-Za-z0-9]+", "-", words).strip("-").lower()[:80] or "adapter"
