"""Keeps songs in RAM, at most 100 MB of them."""

from sidestep_plugin import hookimpl


@hookimpl
def engine_song_cache():
    return 100_000_000
