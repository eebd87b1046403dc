"""The table of a training's clips, epochs by songs: ``previews.json``, the files that it names, and where they lie."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any, Final

from ..errors import Refusal
from ..files import move, read_json_object, replacing
from .clip_files import is_sound

FOLDER: Final = "previews"  # folder of the clips in the output folder of a training
FILE_NAME: Final = "previews.json"
SCHEMA_VERSION: Final = 1
BASE: Final = "base model"  # what the row of epoch 0 is called: the model without the adapter


@dataclass
class Row:
    """The clips of one state of the adapter, such as "epoch 3": a file for each song, relative to the folder.

    `epoch` is the number of finished epochs, 0 for the base model, None if unknown. `loss` is the mean of that epoch,
    None if unknown or not finite.
    """

    label: str
    epoch: int | None
    loss: float | None
    clips: list[str]

    def __post_init__(self) -> None:
        if self.loss is not None and not math.isfinite(self.loss):
            self.loss = None


@dataclass
class Table:
    """All clips of a training, in rows that are sorted by epoch.

    `about` is what they share: the model's name, the songs with their lengths and prompts, and the settings.
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
        return [row for row in self.rows if not all(map(is_sound, row.clips))]

    def as_report(self) -> dict[str, Any]:
        """For the page that plays the clips: "decoded" tells the rows that a browser plays."""
        rows = [{**asdict(row), "decoded": all(map(is_sound, row.clips))} for row in self.rows]
        return {**self.about, "rows": rows}

    def write(self, folder: Path) -> None:
        """Write ``previews.json``. Raises OSError."""
        content = {"schema_version": SCHEMA_VERSION, **self.about, "rows": [asdict(row) for row in self.rows]}
        with replacing(folder / FILE_NAME) as stream:
            stream.write((json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8"))


def read_table(folder: Path) -> Table | None:
    """The table in a folder, as :meth:`Table.write` writes it; None if there is none.

    Raises Refusal for a file that cannot be read, or was edited or damaged so that it is no table of clips.
    """
    try:
        content = read_json_object(folder / FILE_NAME)
        rows = [Row(row["label"], row["epoch"], row["loss"], list(row["clips"])) for row in content["rows"]]
        table = Table({key: content[key] for key in ("model_name", "songs", "settings")}, rows)
        if problem := _problem(table):
            raise ValueError(problem)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, LookupError, OverflowError) as error:
        raise Refusal(
            f"{folder / FILE_NAME} cannot be read ({error or type(error).__name__}). Delete the folder {folder}."
        ) from None
    return table


def _problem(table: Table) -> str:
    """What is wrong with a table that was read; "" when nothing is. Raises TypeError, ValueError or LookupError."""
    json.dumps(table.about, allow_nan=False)  # what could not be written is not there either
    for song in table.about["songs"]:
        float(song["seconds"])
    settings = table.about["settings"]
    for name in ("shift", "steps", "guidance", "seed") if settings else ():
        float(settings[name])
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in table.songs):
        return "it is not a table of clips"
    for row in table.rows:
        epoch = row.epoch is None or (isinstance(row.epoch, int) and not isinstance(row.epoch, bool))
        if not isinstance(row.label, str) or not epoch:
            return f"row {row.label!r} has the epoch {row.epoch!r}"
        if len(row.clips) != len(table.songs) or not all(isinstance(clip, str) and _inside(clip) for clip in row.clips):
            return f"row {row.label!r} names other files than a clip for each song, in this folder"
    return ""


def set_aside(folder: Path) -> Path:
    """Rename a folder of clips that belong to something else. Returns where they are now. Raises OSError."""
    place = _free(folder)
    move(folder, place)
    return place


def leave_branch(folder: Path, table: Table, epoch: int) -> Path | None:
    """Take what was made after an epoch out of a table: the training goes on from there on a branch of its own.

    Rows of later epochs are moved with their clips into a folder of their own below `folder`, and with them rows of no
    known epoch, which are of the adapter that the earlier branch has ended with. The base model's row stays.

    Returns where they are now; None if there is nothing later. Raises OSError.
    """
    later = [row for row in table.rows if row.epoch is None or row.epoch > epoch]
    if all(row.epoch is None for row in later):
        return None
    place = _free(folder / "abandoned")
    for row in later:
        for clip in row.clips:
            if (folder / clip).is_file():
                (place / clip).parent.mkdir(parents=True, exist_ok=True)
                move(folder / clip, place / clip)
                with suppress(OSError):  # other clips are left in it
                    (folder / clip).parent.rmdir()
    place.mkdir(parents=True, exist_ok=True)
    Table(table.about, later).write(place)
    table.rows[:] = [row for row in table.rows if row not in later]
    table.write(folder)
    return place


def _free(folder: Path) -> Path:
    """A name that nothing has, such as previews-1."""
    names = (folder.with_name(f"{folder.name}-{number}") for number in count(1))
    return next(name for name in names if not name.exists())


def clip_names(label: str, songs: Sequence[str], suffix: str) -> list[str]:
    """File names for a row, relative to the folder, such as "epoch_3/01_my-song" and the suffix."""
    return [f"{_plain(label)}/{number:02d}_{_plain(song)}{suffix}" for number, song in enumerate(songs, start=1)]


def _plain(name: str) -> str:
    """A name that every file system and every address takes."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name).strip("._")[:60] or "x"


def _inside(clip: str) -> bool:
    path = PurePosixPath(clip)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in clip and ":" not in clip
