"""What several tests of validation need: folders of songs, and what was measured."""

from __future__ import annotations

import shutil

import pytest
import torch

from sidestep_plugin.songs.dataset import songs_in
from sidestep_plugin.validation.held_out import choose


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
    from sidestep_plugin.validation.history import History

    found = {}
    judge = History.judge

    def noted(history, validation):
        assert validation.epoch not in found, "validated twice"
        found[validation.epoch] = validation.losses.clone()
        return judge(history, validation)

    monkeypatch.setattr(History, "judge", noted)
    return found


@pytest.fixture
def overfitting(checkout, folder_of):
    """Two songs that have nothing in common with the others: what is learned of them is wrong for these."""
    songs = songs_in(checkout.tensors)
    out = choose(songs, 4)
    folder = folder_of(songs)
    for song in songs:
        if song not in out:
            tensors = torch.load(folder / song.name, weights_only=True)
            generator = torch.Generator().manual_seed(1)
            tensors["target_latents"] = tensors["target_latents"] * -3.0 + torch.randn(64, generator=generator)
            torch.save(tensors, folder / song.name)
    return folder
