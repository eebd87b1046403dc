"""Keeps songs in RAM after they were read once (``--song-cache``): ACE-Step reads each song's file in every epoch."""

from __future__ import annotations

import re
from typing import Any, Final

import click

from sidestep_plugin import hookimpl
from sidestep_plugin.free_memory import free_memory
from sidestep_plugin.run import Run
from sidestep_plugin.songs.dataset import songs_in
from sidestep_plugin.text import counted

SHARE: Final = 0.5
"""Share of the free memory that the songs may take with ``auto``."""

_UNITS: Final = {
    letter + unit: base**power
    for power, letter in enumerate("kmgt", start=1)
    for unit, base in (("", 1024), ("b", 1000), ("ib", 1024))
}

_KEY: Final = "sidestep.song_cache"


class CacheSize(click.ParamType[str]):
    """``auto``, ``off`` or a size with its unit, such as ``4GB`` or ``1.5 GiB``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = value.strip() if isinstance(value, str) else ""
        if text.lower() not in ("auto", "off") and not _bytes_in(text):
            self.fail(f"{value!r}: expected auto, off or a size such as 4GB.", param, ctx)
        return text.lower() if text.lower() in ("auto", "off") else text


def options() -> list[click.Option]:
    return [
        click.Option(
            ["--song-cache"],
            type=CacheSize(),
            metavar="SIZE",
            default="auto",
            show_default=True,
            help="RAM for songs that were read: auto, off, or a size such as 4GB.",
        )
    ]


@hookimpl(specname="acestep_run_started", trylast=True)
def decide_cache(run: Run) -> list[str]:
    """Decide how much RAM the songs may take, and say it in one line where songs are kept."""
    wanted = run.options["song_cache"]
    songs = [] if run.tensor_dir is None else songs_in(run.tensor_dir)
    # Read once, nothing is gained by keeping them.
    if wanted == "off" or not songs or getattr(run.training_config, "max_epochs", None) == 1:
        return []
    if workers := getattr(run.training_config, "num_workers", 0):
        return [
            f"Note: songs are not kept in RAM, because they are read by {counted(workers, 'process')} "
            "(--num-workers 0 keeps them)."
        ]
    free = free_memory()
    if wanted == "auto" and free is None:
        return [
            "Note: songs are not kept in RAM, because this system does not say how much is free (--song-cache 4GB)."
        ]
    allowed = int(SHARE * (free or 0)) if wanted == "auto" else _bytes_in(wanted)
    size = sum(file.stat().st_size for file in set(songs))
    run.state[_KEY] = allowed
    lines = []
    if free is not None and min(allowed, size) > free:
        lines = [f"Warning: --song-cache {wanted} is more than the free memory ({_shown(free)}). Choose less."]
    if size <= allowed:
        return [*lines, f"Songs: kept in RAM after the first epoch ({_shown(size)}; same result, bit for bit)"]
    share = f"{_shown(allowed)} of {_shown(size)}"
    return [*lines, f"Songs: {share} kept in RAM after the first epoch (same result, bit for bit)"]


@hookimpl
def acestep_song_cache(run: Run) -> int:
    allowed: int = run.state.get(_KEY, 0)
    return allowed


def _bytes_in(text: str) -> int:
    """The bytes that a size with a unit means; 0 for anything else."""
    found = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)\s*([a-z]{1,3})", text.lower())
    return int(float(found[1]) * _UNITS[found[2]]) if found and found[2] in _UNITS else 0


def _shown(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
