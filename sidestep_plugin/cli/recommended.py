"""``acestep-train recommended``: settings for a number of songs, and where each of them comes from."""

from __future__ import annotations

import click

from sidestep_plugin.adapters.kinds import DEFAULT, NAMES
from sidestep_plugin.options import WholeNumber

from .commands import Command, echo_json


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

    They are what others recommend or use. The guided start proposes the same.

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
        click.echo(f"{word:<{width}}  {setting.reason}")
    click.echo(f"\nOn a command line:\n  --adapter-type {adapter_type} {' '.join(words)}")
