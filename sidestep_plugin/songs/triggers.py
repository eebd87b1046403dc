"""The trigger word of finished songs: which it is, and whether their captions hold it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import not_a_file
from ..text import counted, listed, shown
from .one_song import load_song, metadata_in
from .song_text import POSITIONS, Trigger, holds, trigger_of


def metadata_of(file: Path) -> Mapping[str, Any]:
    """What a song says about itself under "metadata"; empty where it says nothing, or is no song."""
    try:
        return {} if not_a_file(file) else metadata_in(load_song(file))  # opening a named pipe would wait
    except Exception:  # torch raises a dozen types for a damaged file, and another check says so
        return {}


def trigger_of_songs(folder: Path, files: Sequence[Path]) -> Trigger | None:
    """The trigger word that songs were prepared with: as most of them say, else as their folder's manifest says."""
    said: Counter[tuple[str, str]] = Counter()
    for metadata in map(metadata_of, files):
        record = metadata.get("prepared")
        of_record = isinstance(record, Mapping) and record.get("trigger")
        word = of_record or metadata.get("custom_tag")
        if isinstance(word, str) and word.strip():
            position = str(record.get("trigger_position") or "") if isinstance(record, Mapping) else ""
            said[word.strip(), position] += 1
    if not said:
        return trigger_of(folder)
    (word, position), _ = said.most_common(1)[0]
    ours = [known for upstreams, known in POSITIONS.items() if position in (upstreams, known)]
    if not ours and (listed := trigger_of(folder)) is not None and listed.word == word:
        ours = [listed.position]
    return Trigger(word, ours[0] if ours else "before", "the songs")


def not_held(word: str, files: Sequence[Path]) -> str | None:
    """A line when captions do not hold a trigger word, None when all do, or when none says what its caption is."""
    captions = {file: str(caption) for file in files if (caption := metadata_of(file).get("caption"))}
    without = [file for file, caption in captions.items() if not holds(caption, word)]
    if not without:
        return None
    if len(without) == len(captions):
        return (
            f'No caption of the songs holds the trigger word "{shown(word, 60)}": the model cannot learn it. '
            "Put it into the captions: acestep-train prepare --trigger"
        )
    names = listed([file.name for file in without])
    return f'{counted(len(without), "caption")} without the trigger word "{shown(word, 60)}": {names}'
