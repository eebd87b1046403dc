"""``index.html``: a page with a player for every clip, songs beside each other and epochs below each other.

It has no script, style or font from anywhere else and refers to the clips by relative addresses, so it opens from the
file system and can be copied together with them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from ..files import replacing
from .clip_files import is_sound
from .table import Table

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


_PAGE: Final = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Previews of {{ model }}</title>
<style>{{ style }}</style>
</head>
<body>
<h1>Previews of an adapter for {{ model }}</h1>
<p>{% if settings %}{{ settings.steps }} steps, shift {{ "%g" % settings.shift }},
{{ "CFG %g" % settings.guidance if settings.guidance > 1 else "no CFG" }}, seed {{ settings.seed }}.{% endif %}
Every clip of a song starts from the same noise.</p>
<div class="wide"><table>
<thead><tr><th scope="col">epoch</th><th scope="col">loss</th>
{%- for song in songs %}<th scope="col">{{ song.name }} <small>{{ "%.1f" % song.seconds }} s</small></th>{% endfor -%}
</tr></thead>
<tbody>
{% for row in rows %}
<tr{% if row.epoch == 0 %} class="base"{% endif %}><th scope="row">{{ row.label }}</th>
<td class="loss">{% if row.loss is not none %}{{ "%.4f" % row.loss }}{% endif %}</td>
{% for clip in row.clips %}
<td>
{%- if is_sound(clip) -%}
<audio controls preload="metadata" src="{{ clip|urlencode }}"
 aria-label="{{ songs[loop.index0].name }}, {{ row.label }}"></audio>
{%- else -%}
<small>not decoded yet</small>
{%- endif -%}
</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table></div>
<script>{{ script }}</script>
</body>
</html>
"""


def write_page(folder: Path, table: Table) -> Path:
    """Write the page beside the clips. Returns its file. Raises OSError."""
    with replacing(folder / FILE_NAME) as stream:
        stream.write(page(table).encode("utf-8"))
    return folder / FILE_NAME


def page(table: Table) -> str:
    """The page as text."""
    from jinja2 import Environment
    from markupsafe import Markup

    made = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_PAGE)
    return made.render(
        model=table.about["model_name"] or "ACE-Step 1.5",
        settings=table.about["settings"],
        songs=table.about["songs"],
        rows=table.rows,
        is_sound=is_sound,
        style=Markup(_STYLE),
        script=Markup(_SCRIPT),
    )
