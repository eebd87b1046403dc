"""``acestep-train recommended``: settings for a number of songs, and where each of them comes from."""

from __future__ import annotations

import click

from sidestep_plugin.adapters.kinds import DEFAULT, NAMES
from sidestep_plugin.options import WholeNumber

from .commands import Command, echo_json
from .terminal import echo

_USUAL_SECONDS = 180
"""Length of a song, where no dataset says it."""


@click.command(cls=Command)
@click.option(
    "--songs", type=WholeNumber(1, 10**6), metavar="N", default=15, show_default=True, help="Number of songs."
)
@click.option(
    "--adapter-type", type=click.Choice(NAMES), default=DEFAULT.name, show_default=True, help="Kind of adapter."
)
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def recommended(songs: int, adapter_type: str, as_json: bool) -> None:
    """Print recommended settings for a number of songs, and where each of them comes from.

    They are what others recommend or use. A training takes them unless you say otherwise.

    \b
    Example:
        acestep-train recommended --songs 13
    """
    from sidestep_plugin.recommended import recommended as recommend

    settings = recommend(songs, adapter_type)
    if as_json:
        echo_json({name: {"value": setting.value, "reason": setting.reason} for name, setting in settings.items()})
        return
    words = [f"--{name.replace('_', '-')} {setting.value}" for name, setting in settings.items()]
    width = max(map(len, words))
    for word, setting in zip(words, settings.values(), strict=True):
        echo(f"{word:<{width}}  {setting.reason}")
    needed = f"acestep-train --model base --dataset-dir SONGS --output-dir ADAPTER --adapter-type {adapter_type}"
    echo("\nA training uses these for whatever is left out. To write them down, or to change one:")
    echo(f"  {needed} {' '.join(words)}")
    for line in _times(songs * int(settings["epochs"].value), adapter_type):
        echo(line)


def _times(songs: int, adapter_type: str) -> list[str]:
    """How long that takes with songs of usual length, for each size of model that was measured on a GPU."""
    from sidestep_plugin.measured.reading import card_here, measurements, training_time
    from sidestep_plugin.memory.known import TWO_B, XL

    if not measurements():
        return []
    here, lines = card_here(), []
    for name, size in (("2B model", TWO_B), ("XL model", XL)):
        told = training_time(
            songs, parameters=size.parameters, song_seconds=_USUAL_SECONDS, adapter=adapter_type, card=here
        )
        if told:
            lines.append(f"Time with a {name}: {told}")
    return ["", *lines] if lines else []
