"""Every value of every song is read once: what is not finite is named, and hidden values can be zeroed."""

from __future__ import annotations

import os
import time

import pytest
import torch
from song_files import a_song, save

from sidestep_plugin import Refusal
from sidestep_plugin.songs import values
from sidestep_plugin.songs.dataset import inspect_dataset, songs_in
from sidestep_plugin.songs.values import check_values, hash_of, not_finite_in

NAN, INF = float("nan"), float("inf")


def with_rows(tensor, *rows, value=NAN):
    changed = tensor.clone()
    changed[list(rows)] = value
    return changed


def hidden_nan(*rows, length=12):
    """A song whose last rows of conditions are padding, with NaN in some of these."""
    mask = torch.ones(length)
    mask[list(rows)] = 0
    return a_song(encoder_hidden_states=with_rows(torch.zeros(length, 8), *rows), encoder_attention_mask=mask)


def refused(folder, **more):
    with pytest.raises(Refusal) as error:
        check_values(songs_in(folder), **({"mask_nan": False} | more))
    return str(error.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ["target_latents", "context_latents", "encoder_hidden_states"])
def test_a_value_that_is_not_finite_is_found_in_every_tensor(tmp_path, name, value, dtype):
    tensor = a_song()[name].to(dtype)
    tensor[2, 5] = value
    file = save(tmp_path, song=a_song(**{name: tensor})) / "a.pt"
    (found,) = not_finite_in(file)
    assert (found.tensor, found.rows, found.hidden) == (name, (2,), False)
    assert f"a.pt ({name} row 2). Preprocess them again" in refused(tmp_path)
    assert "--mask-nan" not in refused(tmp_path)


def test_a_mask_that_is_not_finite_is_found_and_hides_nothing(tmp_path):
    save(tmp_path, song=a_song(encoder_attention_mask=torch.tensor([1.0, NAN, 1.0, 0.0])))
    assert "a.pt (encoder_attention_mask row 1)" in refused(tmp_path, mask_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_finite_values_of_every_size_pass(tmp_path, dtype):
    """Their sum is infinite, they are not."""
    huge = torch.full((10, 64), torch.finfo(dtype).max, dtype=dtype)
    save(tmp_path, song=a_song(target_latents=huge))
    assert check_values(songs_in(tmp_path), mask_nan=False) == 0


def test_infinities_that_cancel_each_other_are_found(tmp_path):
    tensor = torch.zeros(10, 64)
    tensor[1, 0], tensor[2, 0] = INF, -INF
    save(tmp_path, song=a_song(target_latents=tensor))
    assert "a.pt (target_latents rows 1-2)" in refused(tmp_path)


def test_what_the_mask_hides_is_refused_with_an_offer(tmp_path):
    save(tmp_path, song=hidden_nan(9, 10, 11))
    text = refused(tmp_path)
    assert "only in rows that the mask hides: a.pt (encoder_hidden_states rows 9-11)" in text
    assert ": --mask-nan (the files stay as they are)" in text
    assert check_values(songs_in(tmp_path), mask_nan=True) == 1


def test_latents_have_a_mask_of_their_own(tmp_path):
    mask = torch.ones(10)
    mask[8:] = 0
    latents = {
        "target_latents": with_rows(torch.zeros(10, 64), 8),
        "context_latents": with_rows(torch.zeros(10, 128), 9),
    }
    save(tmp_path, song=a_song(**latents, attention_mask=mask))
    assert "(target_latents row 8, context_latents row 9)" in refused(tmp_path)
    assert check_values(songs_in(tmp_path), mask_nan=True) == 1


def test_one_row_that_the_mask_shows_is_enough_to_refuse_a_song(tmp_path):
    song = hidden_nan(10, 11)
    song["encoder_hidden_states"][3, 0] = NAN
    save(tmp_path, "bad.pt", song)
    save(tmp_path, "hidden.pt", hidden_nan(11))
    text = refused(tmp_path, mask_nan=True)
    assert "bad.pt (encoder_hidden_states rows 3, 10-11)" in text
    assert "hidden.pt" not in text and "--mask-nan" not in text
    text = refused(tmp_path)
    assert text.index("bad.pt") < text.index("only in rows that the mask hides: hidden.pt")


def test_the_lists_are_bounded(tmp_path):
    many = with_rows(torch.zeros(40, 8), *range(0, 40, 2))
    for number in range(8):
        save(tmp_path, f"{number}.pt", a_song(encoder_hidden_states=many, encoder_attention_mask=torch.ones(40)))
    text = refused(tmp_path)
    assert "0.pt (encoder_hidden_states rows 0, 2, 4, 6, 8 and 15 more)" in text
    assert "4.pt (" in text and "5.pt" not in text and " and 3 more. Preprocess" in text


def test_progress_is_told_when_it_takes_long_and_only_then(tmp_path, monkeypatch):
    for name in ("a.pt", "b.pt", "c.pt"):
        save(tmp_path, name)
    said = []
    check_values(songs_in(tmp_path), mask_nan=False, say=said.append)
    assert said == []
    clock = iter([0.0, 1.0, 3.0, 3.0, 4.0])
    monkeypatch.setattr(values, "time", type("Clock", (), {"monotonic": staticmethod(lambda: next(clock))}))
    check_values(songs_in(tmp_path), mask_nan=False, say=said.append)
    assert said == ["Checking the values of the songs: 1 of 3 ..."]


def test_songs_are_read_once_as_long_as_they_stay_the_same(tmp_path, monkeypatch):
    file = save(tmp_path) / "a.pt"
    reads = []
    load = values.load_song
    monkeypatch.setattr(values, "load_song", lambda path: reads.append(path) or load(path))
    one = hash_of(file)
    for _ in range(3):
        assert check_values([file], mask_nan=False) == 0
    assert reads == [file]
    time.sleep(0.02)  # longer than the clock of a file system ticks
    save(tmp_path, song=hidden_nan(11))
    assert "a.pt" in refused(tmp_path) and len(reads) == 2
    assert hash_of(file) != one


def test_what_is_no_song_is_left_to_the_other_checks(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"no song")
    assert check_values([tmp_path / "a.pt"], mask_nan=False) == 0
    with pytest.raises(Refusal, match="cannot be read"):
        inspect_dataset(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_named_pipe_in_place_of_a_song_is_not_waited_for(tmp_path):
    """As where a validated song is looked at again in mid-training."""
    os.mkfifo(tmp_path / "song.pt")
    with pytest.raises(OSError, match="it is a named pipe"):
        hash_of(tmp_path / "song.pt")
