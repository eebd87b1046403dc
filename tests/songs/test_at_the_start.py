"""What a training says of its songs before its first step: how they were encoded, and their trigger word."""

from __future__ import annotations

import json
import weakref
from types import SimpleNamespace

import pytest
import torch
from song_files import a_song

from sidestep_plugin.run import Run
from sidestep_plugin.songs.plugin import acestep_run_started


@pytest.fixture
def started(tmp_path):
    """Write songs and start a run on them: ``started(metadata, ...)`` gives its lines and its facts."""
    model = torch.nn.Module()
    model.config = SimpleNamespace(_name_or_path="acestep-v15-base")

    def start(*songs, **options):
        for number, metadata in enumerate(songs):
            torch.save(a_song(metadata=metadata), tmp_path / f"song{number}.pt")
        run = Run("lora", None, None, {"trigger": None, **options}, tmp_path, weakref.ref(model))
        lines = acestep_run_started(run)
        return lines, {name: fact for tell in run.facts for name, fact in tell().items()}

    return start


def test_songs_without_a_trigger_say_nothing(started):
    lines, facts = started({"caption": "slow jazz"})
    assert [line for line in lines if "rigger" in line] == [] and "trigger" not in facts


def test_the_trigger_of_the_songs_becomes_the_adapters(started):
    lines, facts = started({"caption": "zyx jazz", "custom_tag": "zyx"}, {"caption": "zyx rock", "custom_tag": "zyx"})
    assert 'Trigger word: "zyx" (from the songs)' in lines
    assert facts["trigger"] == "zyx" and facts["trigger_position"] == "before"


@pytest.mark.parametrize("word", [None, "zyx", "other"])
@pytest.mark.parametrize("told", ["prepared", "manifest"])
def test_where_the_trigger_goes_becomes_a_fact(started, tmp_path, told, word):
    """From what `prepare --trigger-position` has noted in the songs, or from upstream's manifest."""
    metadata = {"caption": "jazz, zyx", "custom_tag": "zyx"}
    if told == "prepared":
        metadata["prepared"] = {"trigger": "zyx", "trigger_position": "after"}
    else:
        manifest = {"metadata": {"custom_tag": "zyx", "tag_position": "append"}, "samples": ["song0.pt"]}
        (tmp_path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    _, facts = started(metadata, trigger=word)
    assert facts == ({} if word == "other" else {"trigger": "zyx", "trigger_position": "after"})


def test_a_trigger_that_no_caption_holds_is_told_and_kept_as_it_was_said(started):
    lines, facts = started({"caption": "slow jazz"}, trigger="zyx")
    assert any("No caption of the songs holds the trigger word" in line for line in lines)
    assert "trigger" not in facts  # the option itself is the fact


def test_a_damaged_song_is_another_checks_business(started, tmp_path):
    (tmp_path / "broken.pt").write_bytes(b"not a song")
    started({"caption": "slow jazz"})
