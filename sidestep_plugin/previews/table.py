"""The table of a training's clips, epochs by songs: ``previews.json``, the files that it names, and where they lie."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any, Final

from ..errors import Refusal
from ..files import move, read_json_object, replacing

FOLDER: Final = "previews"
"""Folder of the clips in the output folder of a training."""
FILE_NAME: Final = "previews.json"
SCHEMA_VERSION: Final = 1
BASE: Final = "base model"
"""What the row of epoch 0 is called: the model without the adapter."""


@dataclass
class Row:
    """The clips of one state of the adapter.

    Attributes:
        label: what the page calls it, such as "epoch 3".
        epoch: number of finished epochs, 0 for the base model, None if unknown.
        loss: mean loss of that epoch, None if unknown.
        clips: a file for each song, relative to the folder: ``.wav``, or ``.safetensors`` with latents.
    """

    label: str
    epoch: int | None
    loss: float | None
    clips: list[str]


@dataclass
class Table:
    """All clips of a training.

    Attributes:
        about: what all clips share: the model's name, songs and their lengths, and the settings.
        rows: in the order in which the page shows them.
    """

    about: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    @property
    def songs(self) -> list[str]:
        return [song["name"] for song in self.about["songs"]]

    def put(self, row: Row) -> None:
        """Add a row, in place of an older one with the same label. Rows are sorted by epoch."""
        kept = [other for other in self.rows if other.label != row.label]
        self.rows = sorted([*kept, row], key=lambda each: float("inf") if each.epoch is None else each.epoch)

    def has(self, label: str) -> bool:
        return any(row.label == label for row in self.rows)

    @property
    def undecoded(self) -> list[Row]:
        """Rows with latents that nobody has decoded yet."""
        return [row for row in self.rows if any(clip.endswith(".safetensors") for clip in row.clips)]

    def write(self, folder: Path) -> None:
        """Write ``previews.json``. Raises OSError."""
        content = {"schema_version": SCHEMA_VERSION, **self.about, "rows": [asdict(row) for row in self.rows]}
        with replacing(folder / FILE_NAME) as stream:
            stream.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))


def about(model_name: str, songs: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What all clips of a table share."""
    return {"model_name": model_name, "songs": [dict(song) for song in songs], "settings": dict(settings)}


def read_table(folder: Path) -> Table | None:
    """The table in a folder.

    Returns:
        The table, as :meth:`Table.write` writes it; None if there is none.

    Raises:
        Refusal: the file cannot be read, or was edited or damaged so that it is no table of clips.
    """
    file = folder / FILE_NAME
    try:
        content = read_json_object(file)
        table = _table_of(content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise Refusal(f"{file} cannot be read ({error}). Delete the folder {folder}.") from None
    if table is None:
        raise Refusal(f"{file} is not a table of clips. Delete the folder {folder}.")
    return table


def _table_of(content: Mapping[str, Any]) -> Table | None:
    """The table that a file holds; None if anything in it has another type than :meth:`Table.write` gives it."""
    songs, rows, settings = (content.get(name) for name in ("songs", "rows", "settings"))
    well = (
        isinstance(content.get("model_name"), str | None)
        and isinstance(songs, list)
        and all(isinstance(song, dict) and isinstance(song.get("name"), str) for song in songs)
        and all(_is_number(song.get("seconds")) for song in songs)
        and isinstance(settings, dict)
        and all(_is_number(settings.get(name, 0)) for name in ("shift", "guidance"))
        and all(_is_whole(settings.get(name, 0)) for name in ("steps", "seed"))
        and isinstance(rows, list)
        and all(isinstance(row, dict) and _is_row(row, len(songs)) for row in rows)
    )
    if not well:
        return None
    shared = {name: content.get(name) for name in ("model_name", "songs", "settings")}
    fields = ("label", "epoch", "loss", "clips")
    return Table(shared, [Row(**{name: row.get(name) for name in fields}) for row in rows or ()])


def _is_row(row: Mapping[str, Any], songs: int) -> bool:
    clips = row.get("clips")
    return (
        isinstance(row.get("label"), str)
        and (row.get("epoch") is None or _is_whole(row["epoch"]))
        and (row.get("loss") is None or _is_number(row["loss"]))
        and isinstance(clips, list)
        and len(clips) == songs
        and all(isinstance(clip, str) and _inside(clip) for clip in clips)
    )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    return (isinstance(value, float) and math.isfinite(value)) or _is_whole(value)


def set_aside(folder: Path) -> Path:
    """Rename a folder of clips that belong to something else | returns where they are now. Raises OSError."""
    names = (folder.with_name(f"{folder.name}-{number}") for number in count(1))
    place = next(name for name in names if not name.exists())
    move(folder, place)
    return place


def clip_names(label: str, songs: Sequence[str], suffix: str) -> list[str]:
    """File names for a row, relative to the folder, such as "epoch_3/01_my-song.wav"."""
    return [f"{_plain(label)}/{number:02d}_{_plain(song)}{suffix}" for number, song in enumerate(songs, start=1)]


def _plain(name: str) -> str:
    """A name that every file system and every address takes."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name).strip("._")[:60] or "x"


def _inside(clip: str) -> bool:
    path = PurePosixPath(clip)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in clip and ":" not in clip
