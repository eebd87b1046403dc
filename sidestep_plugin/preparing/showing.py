"""What ``--dry-run`` shows of each song: the texts that the model will be told, their tokens, and their sources."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from ..engine import song_encoding
from ..engine.song_files import UPSTREAM, words_of
from ..songs.dataset import FRAMES_A_SECOND
from ..songs.song_text import DEFAULT
from ..text import counted, minutes_and_seconds, shown
from .planning import Song, plan
from .request import PrepareRequest, find_places, offline

_LONGEST = 100_000  # characters of a text
_NAMED, _HEAD = 5, 40  # songs that are named, characters before a colon


def dry_run(request: PrepareRequest) -> Iterator[str]:
    """Lines about every song. Nothing is encoded and nothing is written. Raises Refusal."""
    offline()
    planned = plan(request, look=True)
    places = find_places(request)
    handler = song_encoding.make_handler(
        song_encoding.import_handler(places.root), tokenizer=song_encoding.load_tokenizer(places.text_encoder)
    )
    if request.conditions == UPSTREAM:
        yield (
            "Note: --conditions upstream: the lyrics are encoded without their header and cut at 512 tokens; the texts "
            "below are those of a generation."
        )
    for song in planned.songs:
        told = None if song.unusable else song_encoding.read_words(handler, words_of(song.text, _frames(song)))
        yield from _about(song, told)
        for what, lost in (("prompt", told.prompt_lost), ("lyrics", told.lyrics_lost)) if told else ():
            if lost:
                song.problems.append(f"{what} too long: the last {counted(lost, 'token')} are cut. Shorten the {what}")
    yield from (f"Note: {name} belongs to no song any more and will not be trained on." for name in planned.removed)
    yield from problems_of(planned.songs)
    yield from (f"Note: {note}" for note in planned.notes)
    unusable = len(planned.songs) - len(planned.usable)
    yield (
        f"{counted(len(planned.usable), 'song')} for {places.model.name}"
        + (f", and {unusable} that cannot be used" if unusable else "")
        + ". Nothing was written."
    )


def problems_of(songs: Sequence[Song]) -> Iterator[str]:
    """Lines about all problems of a folder: which there are, of how many songs, and what to do. None without any."""
    kinds: dict[str, list[tuple[Song, str]]] = {}
    for song in songs:
        for problem in [*([f"cannot be used: {song.unusable}"] if song.unusable else []), *song.problems]:
            kinds.setdefault(_kind(_unnamed(problem, song)), []).append((song, problem))
    if not kinds:
        return
    yield "Problems:"
    for kind, found in sorted(kinds.items(), key=lambda one: -len(one[1])):
        if len(found) == 1:
            yield f"  {shown(found[0][0].name)}: {shown(found[0][1], 1000)}"
            continue
        names = ", ".join(shown(song.name) for song, _ in found[:_NAMED])
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        song, problem = found[0]
        advice = problem.rpartition(". ")[2] if ". " in problem else ""
        told = f". {_unnamed(advice, song)}" if advice else f", such as: {problem}"
        yield f"  {kind}: {len(found)} of {counted(len(songs), 'song')} ({names}{more}){shown(told, 1000)}"


def _unnamed(text: str, song: Song) -> str:
    """A text in which the song's own files are called NAME.txt and so on."""
    return re.sub(rf"(?<!\w){re.escape(song.source.stem)}(?=\.\w)", "NAME", text)


def _kind(problem: str) -> str:
    """What a problem is about, without the song's own names and numbers."""
    head, colon, _ = problem.partition(": ")
    return head if colon and len(head) <= _HEAD else re.sub(r"\d+(\.\d+)?", "N", problem.partition(" (")[0])


def _frames(song: Song) -> int:
    return max(1, int(song.seconds * FRAMES_A_SECOND))


def _about(song: Song, told: song_encoding.Told | None) -> Iterator[str]:
    length = minutes_and_seconds(song.seconds)
    yield f"{shown(song.name)} -> {shown(song.file.name)}, {length}"
    if told is None:
        yield f"  cannot be used: {song.unusable}"
        return
    yield f"  prompt, {_tokens(told.prompt_tokens, told.prompt_lost, song_encoding.PROMPT_TOKENS)}:"
    yield from _quoted(told.prompt)
    yield f"  lyrics, {_tokens(told.lyric_tokens, told.lyrics_lost, song_encoding.LYRIC_TOKENS)}:"
    yield from _quoted(told.lyrics)
    by_source: dict[str, list[str]] = {}
    for field, source in song.text.sources.items():
        if source != DEFAULT or field not in ("trigger", "genre", "instrumental"):
            by_source.setdefault(source, []).append(field)
    yield "  from: " + "; ".join(f"{shown(source)}: {', '.join(fields)}" for source, fields in by_source.items())
    for note in song.notes:
        yield f"  note: {shown(note, 1000)}"
    for problem in song.problems:
        yield f"  problem: {shown(problem, 1000)}"


def _tokens(whole: int, lost: int, most: int) -> str:
    return counted(whole, "token") + (f", of which the last {lost} are cut (the model reads {most})" if lost else "")


def _quoted(text: str) -> Iterator[str]:
    yield from (f"    | {shown(line, _LONGEST)}".rstrip() for line in text.splitlines())
