"""``acestep-train prepare``: audio and texts into songs to train on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sidestep_plugin.errors import Refusal
from sidestep_plugin.options import FiniteFloat, Line, Place

from .command_line import quoted
from .commands import INTERRUPTED, OURS, Command, Unusable, chosen
from .quiet import quiet_third_parties, quiet_upstream
from .terminal import program, say
from .training_options import ACESTEP_ROOT, CHECKPOINT_DIR, FOLDER, check_device, plugin_option

if TYPE_CHECKING:
    from sidestep_plugin.preparing.job import Done
    from sidestep_plugin.preparing.planning import Plan
    from sidestep_plugin.preparing.request import PrepareRequest

_GROUPS = {
    "Needed": ("model", "output"),
    "Texts": ("dataset", "trigger", "trigger_position", "language", "as_typed", "texts", "strict"),
    "Usual": ("renew", "dry_run", "low_memory", "acestep_root", "checkpoint_dir", "device"),
    "Expert": ("conditions", "plugin", "max_seconds", "debug"),
}


@click.command(cls=Command, groups=_GROUPS)
@click.argument("audio_dir", metavar="AUDIO_DIR", required=False, type=FOLDER)
@click.option("--model", metavar="NAME|DIR", required=True, help="Model that the songs are for: base, sft, turbo, ...")
@click.option("--output", type=FOLDER, metavar="DIR", help="Folder for the songs.")
@click.option(
    "--renew", type=FOLDER, metavar="DIR", help="Give the finished songs in DIR new conditions, without their audio."
)
@click.option("--dry-run", is_flag=True, help="Show what the model will be told about each song, and write nothing.")
@click.option("--dataset", type=Place(path_type=Path), metavar="FILE", help="Dataset JSON of ACE-Step or Side-Step.")
@click.option("--texts", type=FOLDER, metavar="DIR", help="With --renew: folder of texts beside the songs' own.")
@click.option("--trigger", type=Line(), metavar="WORD", help="Trigger word, put into every caption.")
@click.option(
    "--trigger-position",
    type=click.Choice(["before", "after", "instead"]),
    default="before",
    show_default=True,
    help="Where the trigger word goes.",
)
@click.option(
    "--language",
    callback=lambda _, __, value: _language(value),
    metavar="CODE",
    help="What is sung where no file says it: en, de, zh, ...",
)
@click.option("--as-typed", is_flag=True, help="Leave key, time signature, language and bpm as they are typed.")
@click.option("--strict", is_flag=True, help="Refuse songs with problems instead of telling them.")
@click.option("--low-memory", is_flag=True, help="Encode all sound first, then all texts: less memory at a time.")
@click.option(
    "--conditions",
    type=click.Choice(["generated", "upstream"]),
    help="Encode texts as the app generates, or as its preprocessing does.  [default: generated]",
)
@plugin_option()
@click.option(
    "--max-seconds",
    type=FiniteFloat(0.04, 600.0),
    metavar="S",
    default=240.0,
    show_default=True,
    help="Longest part of a song that is used.",
)
@ACESTEP_ROOT
@CHECKPOINT_DIR
@click.option(
    "--device",
    default="auto",
    show_default=True,
    callback=check_device,
    metavar="DEVICE",
    help="auto, cpu, cuda, cuda:N, mps or xpu.",
)
@click.option("--debug", is_flag=True, help="Show where an error came from, and ACE-Step's own log.")
def prepare(
    audio_dir: Path | None,
    output: Path | None,
    renew: Path | None,
    trigger: str | None,
    trigger_position: str,
    dry_run: bool,
    max_seconds: float,
    debug: bool,
    conditions: str | None,
    plugin: tuple[str, ...],
    **asked: Any,
) -> None:
    """Prepare songs to train on, from audio and the texts beside it.

    Each song gets the conditions that ACE-Step's app generates it with: the same prompt, lyrics with their header, and
    silence for reference audio. Texts are read from NAME.caption.txt, NAME.lyrics.txt, NAME.txt, NAME.json, a CSV, or a
    dataset JSON. Run it again after changing something: only what changed is made anew.

    \b
    Examples:
        acestep-train prepare music --model base --output songs
        acestep-train prepare --renew old-songs --model base --output songs
    """
    quiet_third_parties()
    if not debug:
        quiet_upstream()
    try:
        conditions = conditions or _conditions(plugin)
        asked |= {"longest": max_seconds, "conditions": conditions}
        request = _request(audio_dir, output, renew, trigger, trigger_position, dry_run, **asked)
        if dry_run:
            _show(request)
        else:
            run_prepare(request)
            _say_next(request, str(output))
    except Refusal as refusal:
        if debug:
            raise
        raise Unusable(str(refusal)) from None
    except OSError as error:
        if debug:
            raise
        raise Unusable(
            f"Cannot write the songs: {error.strerror or error}: {error.filename or output}. Finished songs are "
            "complete; make room or choose another --output, and run the same command again."
        ) from None
    except KeyboardInterrupt:
        say("Interrupted. Finished songs are complete; the same command goes on from there.", err=True)
        raise SystemExit(INTERRUPTED) from None


def _language(said: str | None) -> str | None:
    """A language as the model knows it. Raises click.BadParameter for another one."""
    from sidestep_plugin.songs import vocabulary

    word = vocabulary.language(said)
    if said is not None and (not word.known or word.value not in vocabulary.LANGUAGES):
        raise click.BadParameter(f"the model does not know {said!r}. Expected a code such as en, de, ja or zh.")
    return None if said is None else str(word.value)


def _conditions(said: Sequence[str]) -> str:
    """How texts are encoded when nobody says it: without the plugin sidestep, as ACE-Step's preprocessing does."""
    from sidestep_plugin.registry import Registry

    plugins = chosen(said)
    Registry.load(plugins)
    return "generated" if OURS in plugins else "upstream"


def _request(
    audio_dir: Path | None,
    output: Path | None,
    renew: Path | None,
    trigger: str | None,
    position: str,
    dry_run: bool,
    **asked: Any,
) -> PrepareRequest:
    from sidestep_plugin.preparing.request import PrepareRequest
    from sidestep_plugin.songs.song_text import Trigger

    if (audio_dir is None) == (renew is None):
        raise click.UsageError("Name the folder of audio, or finished songs with --renew DIR: one of the two.")
    if asked["texts"] is not None and renew is None:
        raise click.UsageError(
            "--texts belongs to --renew. Leave it out: texts of audio are read from the audio's own folder."
        )
    source = audio_dir or renew
    assert source is not None
    if output is None:
        if not dry_run:
            raise click.UsageError("Name the folder for the songs: --output DIR.")
        output = source.absolute().with_name(f"{source.absolute().name}-songs")
    where: Any = position
    return PrepareRequest(
        source=source.absolute(),
        output=output.absolute(),
        renew=renew is not None,
        trigger=Trigger(trigger, where) if trigger else None,
        **asked,
    )


def _show(request: PrepareRequest) -> None:
    from sidestep_plugin.preparing.showing import dry_run

    for line in dry_run(request):
        say(line)


def run_prepare(request: PrepareRequest) -> None:
    """Prepare songs and tell about it.

    Raises:
        Refusal: as :func:`sidestep_plugin.preparing.job.prepare`.
        Unusable: some songs could not be prepared.
    """
    from sidestep_plugin.preparing.job import prepare as prepare_songs

    done = prepare_songs(request, say, _tell)
    _sum_up(request, done)


def _tell(plan: Plan) -> None:
    """Everything that is worth knowing before the work begins."""
    from sidestep_plugin.text import shown

    for note in plan.notes:
        say(f"Note: {note}")
    for song in plan.songs:
        lines = [*([f"cannot be used: {song.unusable}"] if song.unusable else []), *song.problems]
        for line in lines:
            say(f"Warning: {shown(song.name, 80)}: {shown(line, 1000)}")
        if song.make != "nothing":
            for line in song.notes:
                say(f"Note: {shown(song.name, 80)}: {shown(line, 1000)}")


def _say_next(request: PrepareRequest, output: str) -> None:
    """The commands for finished songs, with their folder as it was typed."""
    where = (("--acestep-root", request.acestep_root), ("--checkpoint-dir", request.checkpoint_dir))
    train = [f"--model={request.model}", f"--dataset-dir={output}", "--output-dir=OUTPUT"]
    train += [f"{flag}={place}" for flag, place in where if place is not None]
    say("Next:")
    say("  Look at them:")
    say(f"    {quoted([program(), 'songs', output])}")
    say("  Train on them, into a new folder OUTPUT:")
    say(f"    {quoted([program(), *(word for said in train for word in said.split('=', 1))])}")


def _sum_up(request: PrepareRequest, done: Done) -> None:
    from sidestep_plugin.text import counted, shown

    for name in done.removed:
        say(f"Note: {shown(name, 80)} in {request.output} belongs to no song any more, and is not in manifest.json.")
    parts = [
        f"{counted(done.made, 'song')} prepared" if done.made else "",
        f"{counted(done.renewed, 'song')} with new conditions" if done.renewed else "",
        f"{counted(done.kept, 'song')} as before" if done.kept else "",
    ]
    if any(parts):
        say(f"{', '.join(filter(None, parts))}: {request.output}")
    if done.failed:
        names = "; ".join(f"{shown(name, 80)} ({shown(reason, 500)})" for name, reason in done.failed)
        raise Unusable(
            f"{counted(len(done.failed), 'song')} could not be prepared: {names}. Correct that, and run it again."
        )
