"""What songs say about themselves when a training starts: how they were made, and their trigger word."""

from __future__ import annotations

from ..hookspecs import hookimpl
from ..run import ModelFacts, Run
from .dataset import songs_in
from .making import making_of, upstream_notice
from .one_song import read_song
from .triggers import not_held, trigger_of_songs


@hookimpl
def acestep_run_started(run: Run) -> list[str]:
    if run.tensor_dir is None:
        return []
    files = songs_in(run.tensor_dir)
    model = ModelFacts.from_model(run.model).name
    read = [song for song, problem in map(read_song, files) if not problem]
    lines = [upstream_notice(run.tensor_dir, [making_of(song) for song in read], model)]
    trigger = trigger_of_songs(run.tensor_dir, files)
    word = run.options.get("trigger")
    if trigger is not None and word in (None, trigger.word):
        run.facts.append(lambda: {"trigger": trigger.word, "trigger_position": trigger.position})
    if word:
        lines.append(not_held(word, files))
    elif trigger is not None:
        lines.append(f'Trigger word: "{trigger.word}" (from {trigger.source})')
    return [f"Note: {line}" if not line.startswith("Trigger") else line for line in lines if line]
