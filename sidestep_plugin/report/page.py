"""``index.html``: the page of a training, made from its data by the template ``page.html`` beside this file.

The page has no script, style, font or picture from anywhere else, and refers to clips by relative addresses: it opens
from the file system and can be copied with its folder. It holds its data, so that it can be made anew from it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..errors import Refusal
from ..files import replacing
from ..text import shown
from .charts import can_draw, charts

if TYPE_CHECKING:
    from jinja2 import Template

FILE_NAME: Final = "index.html"
CLIPS: Final = "previews"
"""Name of a training's folder of clips, and the report's entry about them."""

SCHEMA_VERSION: Final = 1
REFRESH: Final = 20
"""Seconds after which the page of a running training is read again."""

_MARK: Final = '<meta name="generator" content="sidestep-plugin">'
_DATA: Final = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)
_LONGEST: Final = 4000  # characters of a text


def page(data: Mapping[str, Any]) -> str:
    """The page as text.

    Args:
        data: what :class:`~.live_page.LivePage` gathers, ready for JSON. The entry "report" has the entries of
            ``training_report.json``; without it, the page has nothing but clips.

    Raises:
        Exception: the data is of another version, or matplotlib cannot draw.
    """
    from markupsafe import Markup

    report = data.get("report")
    drawn = {name: Markup(svg) for name, svg in charts(report).items()} if report else {}  # our own numbers alone
    embedded = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    return _template().render(
        **{name: data.get(name) for name in _TOP},
        charts=drawn,
        can_draw=can_draw(),
        mark=Markup(_MARK),
        refresh=REFRESH,
        embedded=Markup(embedded),
    )


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, finalize=_printable
    )
    environment.filters.update(duration=duration, size=_size, percent=_percent, number=_number, moment=_moment)
    return environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))


_TOP: Final = (
    *("state", "reason", "written", "seconds", "seconds_left", "seconds_per_epoch", "epochs_done", "epochs"),
    *("steps", "limit", "resumed_step"),
    *("resumed_after", "facts", "report", "songs", "held_out", "told", "memory", "folder", "final", "saved"),
    *("commands", "clips"),
)


def write_page(folder: Path, data: Mapping[str, Any]) -> Path:
    """Write the page into a folder, whole or not at all.

    Returns:
        Its file.

    Raises:
        Refusal: the folder has an ``index.html`` that is not a training's page.
        OSError: it cannot be written.
        Exception: see :func:`page`.
    """
    file = folder / FILE_NAME
    if not is_ours(file):
        raise Refusal(f"{file} is not the page of a training, so it was left as it is. Move it away to get one.")
    text = page(data)
    with replacing(file) as stream:
        stream.write(text.encode("utf-8"))
    return file


def is_ours(file: Path) -> bool:
    """Whether a file is a page of a training, or is not there yet."""
    try:
        with file.open("rb") as stream:
            return _MARK.encode() in stream.read(2000)
    except FileNotFoundError:
        return True
    except OSError:
        return False


def read_page(file: Path) -> dict[str, Any] | None:
    """The data of a page; None if there is no page of a training of this version."""
    try:
        found = _DATA.search(file.read_text(encoding="utf-8"))
        data = json.loads(found[1]) if found else None
    except (OSError, ValueError, RecursionError):
        return None
    known = isinstance(data, dict) and data.get("schema_version") == SCHEMA_VERSION
    return data if known else None


def show_clips(folder: Path, clips: Mapping[str, Any]) -> Path:
    """Put clips that were made from a saved adapter on the page of its training, or on one of their own.

    Args:
        folder: the folder of the clips. One that is named "previews" belongs to the training in the folder above.
        clips: the table, with addresses relative to `folder`.

    Returns:
        The page.

    Raises:
        Refusal, OSError: see :func:`write_page`.
    """
    above = folder.parent if folder.name == CLIPS and is_ours(folder.parent / FILE_NAME) else folder
    if above != folder:
        clips = within(clips, folder.name)
    data = read_page(above / FILE_NAME) or {"schema_version": SCHEMA_VERSION, "state": "clips"}
    if data.get("report"):
        data["report"] = {**data["report"], CLIPS: clips}
    else:
        data |= {"clips": clips, "written": now()}
    return write_page(above, data)


def within(clips: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """A table of clips whose addresses are told from the folder above its own."""
    rows = [{**row, "clips": [f"{folder}/{clip}" for clip in row["clips"]]} for row in clips["rows"]]
    return {**clips, "rows": rows}


def now() -> str:
    """The time, ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _printable(value: Any) -> Any:
    """Texts of strangers without what moves the cursor or turns the direction; everything else as it is."""
    from markupsafe import Markup

    if isinstance(value, str) and not isinstance(value, Markup):
        return shown(value, _LONGEST)
    return value


def duration(seconds: float) -> str:
    """Such as "3 s", "12:05" (minutes) or "1:02:03"."""
    whole = int(seconds)  # as on the terminal
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02} min"


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:+.2f} %".replace("-", "−")


def _number(value: Any) -> str:
    """A loss, or nothing where it is not known."""
    return "" if value is None else f"{value:.4f}"


def _moment(text: str) -> str:
    """A time in UTC for people."""
    return text.replace("T", " ").removesuffix("+00:00") + " UTC"
