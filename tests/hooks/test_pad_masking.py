"""Padding of shorter conditions in a batch: a song's decoder output is that of the song alone."""

from __future__ import annotations

import pytest
import torch
from sidestep_plugin.hooks.pad_masking import Masking

from sidestep_plugin import attach

ROWS = (5, 9, 14)


def a_batch(model, rows=ROWS, frames=24, dtype=torch.float32):
    """Songs of one length whose conditions have different lengths, padded as upstream pads them."""
    generator = torch.Generator().manual_seed(3)
    width = model.null_condition_emb.shape[-1]
    longest, size = max(rows), len(rows)
    states = torch.zeros(size, longest, width)
    mask = torch.zeros(size, longest)
    for row, length in enumerate(rows):
        states[row, :length] = torch.randn(length, width, generator=generator)
        mask[row, :length] = 1.0
    noise = torch.randn(size, frames, 64, generator=generator)
    context = torch.randn(size, frames, 128, generator=generator)
    t = torch.full((size,), 0.5)
    return {
        name: value.to(dtype)
        for name, value in {
            "hidden_states": noise,
            "timestep": t,
            "timestep_r": t,
            "attention_mask": torch.ones(size, frames),
            "encoder_hidden_states": states,
            "encoder_attention_mask": mask,
            "context_latents": context,
        }.items()
    }


def alone(decoder, batch, row, rows):
    one = {name: value[row : row + 1] for name, value in batch.items()}
    for name in ("encoder_hidden_states", "encoder_attention_mask"):
        one[name] = one[name][:, :rows]
    return decoder(**one)[0]


@pytest.mark.parametrize("model", ["base", "turbo"])
def test_a_song_in_a_batch_is_the_song_alone(load, model):
    model = load(model).model
    batch = a_batch(model)
    with torch.no_grad():
        before = model.decoder(**batch)[0]
        masking = Masking(model.decoder)
        after = model.decoder(**batch)[0]
        masking.remove()
        for row, rows in enumerate(ROWS):
            one = alone(model.decoder, batch, row, rows)[0]
            assert float((after[row] - one).norm() / one.norm()) < 1e-6
        shortest = alone(model.decoder, batch, 0, ROWS[0])[0]
        assert float((before[0] - shortest).norm() / shortest.norm()) > 1e-3, "the comparison can fail"
        assert torch.equal(model.decoder(**batch)[0], before), "removed, the decoder is as before"


def test_one_song_and_songs_of_equal_length_are_left_as_they_are_bit_for_bit(load):
    model = load("base").model
    for rows in ((9,), (9, 9)):
        batch = a_batch(model, rows)
        with torch.no_grad():
            before = model.decoder(**batch)[0]
            masking = Masking(model.decoder)
            assert torch.equal(model.decoder(**batch)[0], before)
            masking.remove()


def test_dropped_conditions_are_the_null_condition_whatever_is_masked(load):
    model = load("base").model
    batch = a_batch(model)
    batch["encoder_hidden_states"] = model.null_condition_emb.detach().expand_as(batch["encoder_hidden_states"])
    with torch.no_grad():
        before = model.decoder(**batch)[0]
        masking = Masking(model.decoder)
        after = model.decoder(**batch)[0]
        masking.remove()
    assert float((after - before).norm() / before.norm()) < 1e-6


# -- in a training ----------------------------------------------------------------------------------------------------


@pytest.fixture
def songs(checkout, tmp_path):
    """The miniature's songs, as if prepared here: of equal length in time, and of different prompts."""
    folder = tmp_path / "songs"
    folder.mkdir()
    for number, file in enumerate(sorted(checkout.tensors.glob("*.pt"))):
        song = torch.load(file, weights_only=True)
        rows = 6 + 3 * number
        states = song["encoder_hidden_states"]
        song |= {
            "encoder_hidden_states": states.repeat(4, 1)[:rows].clone(),
            "encoder_attention_mask": torch.ones(rows),
        }
        for name in ("target_latents", "attention_mask", "context_latents"):
            song[name] = song[name][:16].clone()
        song["metadata"] = {"prepared": {"form": "generated", "model": "", "encoders": ""}}
        torch.save(song, folder / file.name)
    return folder


def test_a_training_on_prepared_songs_masks_and_says_so(train, songs, capsys):
    done = train("turbo", tensors=songs, batch_size=3)
    assert "Padding: masked in cross-attention" in capsys.readouterr().out
    assert done.tensors, done.messages
    off = train("turbo", tensors=songs, batch_size=3, options={"mask_padding": "off"})
    assert "Padding" not in capsys.readouterr().out
    assert done.losses != off.losses, "the padding was attended to"


def test_layers_that_are_computed_twice_are_masked_twice(train, songs, equal_bits):
    """Gradient checkpointing computes a layer again in the backward pass, when the decoder itself is not called."""
    on, off = (
        train("turbo", tensors=songs, batch_size=3, options={"gradient_checkpointing": choice})
        for choice in ("on", "off")
    )
    assert equal_bits(on, off)


def test_a_batch_of_one_changes_no_bit_and_says_nothing(train, songs, equal_bits, capsys):
    one = train("turbo", tensors=songs, batch_size=1)
    two = train("turbo", tensors=songs, batch_size=1, options={"mask_padding": "off"})
    assert equal_bits(one, two) and "Padding" not in capsys.readouterr().out


def test_songs_of_upstreams_preprocessing_are_left_as_they_are(train, checkout, equal_bits):
    auto = train("turbo", batch_size=3)
    off = train("turbo", batch_size=3, options={"mask_padding": "off"})
    assert equal_bits(auto, off)
    refused = train("turbo", batch_size=3, options={"mask_padding": "on"})
    assert "whose masks can be wrong" in refused.messages[-1]


def test_flash_attention_is_told(train, songs, load, capsys):
    handler = load("turbo")
    handler.model.decoder.config._attn_implementation = "flash_attention_2"
    train("turbo", handler=handler, tensors=songs, batch_size=3)
    out = capsys.readouterr().out
    assert "flash attention takes no such mask" in out and "--batch-size 1 --gradient-accumulation 3" in out


def test_nothing_stays_in_the_decoder_after_a_training(train, songs, load):
    handler = load("turbo")
    decoder = handler.model.decoder
    train("turbo", handler=handler, tensors=songs, batch_size=3)
    assert not any(module._forward_pre_hooks for module in decoder.modules())


def test_a_step_outside_of_a_training_is_left_alone(trainer, load, module_for, batch_of):
    handler = load("base")
    module = module_for(handler)
    with attach(trainer, announce=print):
        module.training_step(batch_of(handler.model, 2))
    assert not any(module._forward_pre_hooks for module in handler.model.decoder.modules())
