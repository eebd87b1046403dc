"""``acestep-train songs``: what is in a folder of songs, how they were made, and what looks wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sidestep_plugin.errors import Refusal
from sidestep_plugin.options import Place
from sidestep_plugin.text import counted, minutes_and_seconds, shown

from .commands import Command, Unusable, echo_json
from .terminal import cells, columns, echo

_NARROWEST = 8  # columns of a terminal for a name or a text


if TYPE_CHECKING:
    from sidestep_plugin.songs.showing import ShownFolder, ShownSong


@click.command("songs", cls=Command)
@click.argument("folder", type=Place(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print as JSON, with all that each song says about itself.")
def songs(folder: Path, as_json: bool) -> None:
    """Show what is in a folder of songs: length, prompt, lyrics, how they were made, and what looks wrong.

    FOLDER is what a training takes as --dataset-dir. No model is needed, and nothing is changed.

    \b
    Example:
        acestep-train songs datasets/jazz
    """
    from sidestep_plugin.songs.showing import look_through

    try:
        found = look_through(folder.absolute())
    except Refusal as refusal:
        raise Unusable(str(refusal)) from None
    if as_json:
        echo_json(_json(found))
        return
    for line in _lines(found):
        echo(line)


def _json(found: ShownFolder) -> dict[str, Any]:
    return {
        "folder": str(found.folder),
        "seconds": round(found.seconds, 2),
        "trigger": found.trigger,
        "notes": list(found.notes),
        "renew": found.renew,
        "songs": [
            {
                "file": song.file,
                "seconds": round(song.seconds, 2),
                "prompt": None if song.text is None else song.text.prompt,
                "text": None if song.text is None else dataclasses.asdict(song.text),
                "made": None if song.making is None else dataclasses.asdict(song.making),
                "wrong": list(song.wrong),
            }
            for song in found.songs
        ],
    }


def _lines(found: ShownFolder) -> Iterator[str]:
    yield from _table(found.songs)
    minutes = found.seconds / 60.0
    trigger = f', trigger word "{shown(found.trigger, 60)}"' if found.trigger else ""
    yield ""
    yield f"{counted(len(found.songs), 'song')}, {minutes:.1f} minutes{trigger}"
    yield from (f"- {note}" for note in found.notes)
    if reasons := found.reasons():
        yield ""
        yield "What looks wrong:"
        for reason, names in reasons.items():
            listed = ", ".join(shown(name, 60) for name in names[:5])
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            every = f"all {len(names)} songs" if len(names) == len(found.songs) > 1 else listed + more
            yield f"- {reason}: {every}"
    if found.renew:
        yield ""
        yield "For conditions as the app generates with, without audio and in seconds:"
        yield f"    {found.renew}"


def _table(shown_songs: tuple[ShownSong, ...]) -> Iterator[str]:
    from sidestep_plugin.songs.making import FORMS
    from sidestep_plugin.songs.showing import cut, first_words

    rows = [("song", "length", "conditions", "prompt", "lyrics", "wrong")]
    for song in shown_songs:
        length = minutes_and_seconds(song.seconds) if song.making else "-"
        made = FORMS[song.making.form] if song.making else "no song"
        prompt = cut(song.text.prompt, 40) if song.text else "-"
        lyrics = first_words(song.text.lyrics) if song.text else "-"
        rows.append((cut(song.file, 40), length, made, prompt, lyrics, str(len(song.wrong) or "")))
    widths = [max(cells(row[column]) for row in rows) for column in range(6)]
    if (room := columns()) is not None:
        texts = (0, 3, 4)
        while sum(widths) + 2 * 5 > room and max(widths[column] for column in texts) > _NARROWEST:
            widths[max(texts, key=lambda column: widths[column])] -= 1
    for row in rows:
        shortened = [_fitted(cell, width) for cell, width in zip(row, widths, strict=True)]
        blanks = [" " * (width - cells(cell)) for cell, width in zip(shortened, widths, strict=True)]
        parts = [cell + blank for cell, blank in zip(shortened, blanks, strict=True)]
        parts[1] = blanks[1] + shortened[1]
        yield "  ".join(parts).rstrip()


def _fitted(text: str, width: int) -> str:
    """A text in so many columns, without its last words if it does not fit."""
    if cells(text) <= width:
        return text
    while cells(text) > width - 3:
        text = text[:-1]
    words = text.rpartition(" ")[0]
    return (words if 2 * cells(words) > width else text).rstrip() + "..."
