"""Validation on songs that are held out: it measures the same every time, and nothing of it reaches the training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from sidestep_plugin import Refusal, hookimpl
from sidestep_plugin.songs.dataset import songs_in
from sidestep_plugin.songs.held_out import check_apart, choose, number_of
from sidestep_plugin.timesteps.grid import validation_grid
from sidestep_plugin.timesteps.schedule import max_of_two_logit_normal_cdf

TWO = {"validate": 2, "validate_every": 1}


@pytest.fixture
def folder_of(monkeypatch, tmp_path):
    """Make a folder of copies of songs, which every version of ACE-Step lists in the order of their names."""
    import os

    listed, counter = os.listdir, iter(range(100))
    monkeypatch.setattr(os, "listdir", lambda *args: sorted(listed(*args)))

    def make(songs):
        folder = tmp_path / f"songs-{next(counter)}"
        folder.mkdir()
        for song in songs:
            shutil.copy(song, folder)
        return folder

    return make


@pytest.fixture
def measured(monkeypatch):
    """The losses of every validation of the newest training, by epoch."""
    from sidestep_plugin.hooks.validation_history import History

    found = {}
    judge = History.judge

    def noted(history, validation, steps):
        found[validation.epoch] = validation.losses.clone()
        return judge(history, validation, steps)

    monkeypatch.setattr(History, "judge", noted)
    return found


SETTINGS = [
    ("lora", {}),
    ("lora", {"batch_size": 1, "gradient_accumulation_steps": 3}),
    ("lokr", {}),
    ("lokr", {"batch_size": 1, "gradient_accumulation_steps": 3}),
]


@pytest.mark.parametrize("kind, settings", SETTINGS)
def test_the_training_is_the_same_bit_for_bit(train, checkout, folder_of, equal_bits, measured, kind, settings):
    """The reference has only the songs that are left. LoRA dropout and condition dropout are on."""
    songs = songs_in(checkout.tensors)
    left = folder_of(song for song in songs if song not in choose(songs, 2))
    plain = train("base", kind, tensors=left, max_epochs=3, **settings)
    assert not measured
    validated = train("base", kind, tensors=folder_of(songs), options=TWO, max_epochs=3, **settings)
    assert sorted(measured) == [0, 1, 2, 3], validated.messages
    assert equal_bits(plain, validated)
    assert not torch.equal(measured[0], measured[3]), "something was learned"
