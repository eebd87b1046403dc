"""Makes songs for the tests: small tensors of the right shapes, and files of them."""

from __future__ import annotations

import torch


def a_song(width=8, **changed):
    song = {
        "target_latents": torch.zeros(10, 64),
        "attention_mask": torch.ones(10),
        "encoder_hidden_states": torch.zeros(4, width),
        "encoder_attention_mask": torch.ones(4),
        "context_latents": torch.zeros(10, 128),
        "metadata": {"caption": "a song"},
    }
    return {key: value for key, value in {**song, **changed}.items() if value is not None}


def save(folder, name="a.pt", song=None):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(a_song() if song is None else song, folder / name)
    return folder
