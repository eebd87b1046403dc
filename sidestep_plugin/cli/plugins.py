"""``acestep-train plugins``: what is installed, what loads, which hooks each implements, what failed and why."""

from __future__ import annotations

import click

from .commands import echo_json
from .terminal import echo


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def plugins(as_json: bool) -> None:
    """List the installed plugins and the hooks that each implements.

    A plugin takes part in a training only when it is named: acestep-train --plugin NAME.
    """
    import dataclasses

    from sidestep_plugin.registry import GROUP, list_plugins

    listings = list_plugins()
    if as_json:
        echo_json([dataclasses.asdict(listing) for listing in listings])
        return
    if not listings:
        echo(f"No plugins are installed (entry-point group {GROUP}).")
    for listing in listings:
        echo(f"{listing.name} ({listing.distribution} {listing.version})")
        if listing.error:
            echo(f"    failed: {listing.error}")
            continue
        echo(f"    hooks:   {', '.join(listing.hooks)}")
        if listing.options:
            echo(f"    options: {', '.join(listing.options)}")
