"""``index.html``: a page with a player for every clip, songs beside each other and epochs below each other.

It has no script, style or font from anywhere else and refers to the clips by relative addresses, so it opens from the
file system and can be copied together with them.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from ..files import replacing
from ..text import counted
from .table import Row, Table

FILE_NAME: Final = "index.html"

_STYLE: Final = """
:root { color-scheme: light dark; }
body { font: 16px/1.4 system-ui, sans-serif; margin: 2rem; }
h1 { font-size: 1.4rem; margin: 0 0 .3rem; }
p { margin: .2rem 0 1.2rem; opacity: .75; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: .5rem .8rem; text-align: left; border-bottom: 1px solid #8885; white-space: nowrap; }
thead th { font-weight: 600; }
td.loss { font-variant-numeric: tabular-nums; text-align: right; }
small { font-weight: 400; opacity: .7; }
tr.base { background: #8882; }
audio { height: 2.4rem; width: 19rem; display: block; }
"""

# One clip at a time: comparing is listening to one after the other.
_SCRIPT: Final = """
addEventListener("play", event => {
  for (const other of document.querySelectorAll("audio")) if (other !== event.target) other.pause();
}, true);
"""


def write_page(folder: Path, table: Table) -> Path:
    """Write the page beside the clips | returns its file | raises OSError."""
    with replacing(folder / FILE_NAME) as stream:
        stream.write(page(table).encode("utf-8"))
    return folder / FILE_NAME


def page(table: Table) -> str:
    """The page as text."""
    heads = "".join(
        f'<th scope="col">{escape(str(song["name"]))} <small>{float(song["seconds"]):.1f} s</small></th>'
        for song in table.about["songs"]
    )
    rows = "\n".join(_row(row, table.songs) for row in table.rows)
    name = escape(str(table.about["model_name"] or "ACE-Step 1.5"))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Previews of {name}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>Previews of an adapter for {name}</h1>
<p>{escape(_settings(table.about["settings"]))}. Every clip of a song starts from the same noise.</p>
<div class="wide"><table>
<thead><tr><th scope="col">epoch</th><th scope="col">loss</th>{heads}</tr></thead>
<tbody>
{rows}
</tbody>
</table></div>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def _row(row: Row, songs: list[str]) -> str:
    loss = "" if row.loss is None else f"{row.loss:.4f}"
    kind = ' class="base"' if row.epoch == 0 else ""
    cells = "".join(f"<td>{_player(clip, row, song)}</td>" for clip, song in zip(row.clips, songs, strict=True))
    return f'<tr{kind}><th scope="row">{escape(row.label)}</th><td class="loss">{loss}</td>{cells}</tr>'


def _player(clip: str, row: Row, song: str) -> str:
    if not clip.endswith(".wav"):
        return "<small>not decoded yet</small>"
    label = escape(f"{song}, {row.label}", quote=True)
    return f'<audio controls preload="metadata" src="{escape(quote(clip), quote=True)}" aria-label="{label}"></audio>'


def _settings(settings: Any) -> str:
    scale = float(settings.get("guidance", 1.0))
    parts = {
        "steps": counted(settings.get("steps"), "step"),
        "shift": f"shift {float(settings.get('shift', 0.0)):g}",
        "guidance": f"CFG {scale:g}" if scale > 1.0 else "no CFG",
        "seed": f"seed {settings.get('seed')}",
    }
    return ", ".join(text for name, text in parts.items() if name in settings) or "settings not known"
