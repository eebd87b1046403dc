"""``--plot FILE``: whether a picture can be drawn, before anything is computed for it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Final

from sidestep_plugin.errors import Refusal

_PICTURES: Final = (".png", ".svg", ".pdf")


def check_plot(plot: Path) -> None:
    """Raises Refusal for a file that could not be drawn."""
    if plot.suffix.lower() not in _PICTURES:
        raise Refusal(f"--plot {plot} is not a {', '.join(_PICTURES)} file. Name one, as in --plot timesteps.png")
    if not plot.absolute().parent.is_dir():
        raise Refusal(f"No folder {plot.absolute().parent} for the picture. Make it, or choose another --plot.")
    if importlib.util.find_spec("matplotlib") is None:
        raise Refusal("--plot needs matplotlib, which is not installed: pip install 'sidestep-plugin[plot]'")
