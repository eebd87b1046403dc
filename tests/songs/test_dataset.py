"""A folder of preprocessed songs, looked at before anything is loaded."""

import contextlib
import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from song_files import a_song, save

from sidestep_plugin import Refusal
from sidestep_plugin.songs.dataset import inspect_dataset, made_for, songs_in
from sidestep_plugin.songs.one_song import SONG_TENSORS
from sidestep_plugin.text import counted


def write_manifest(folder, content):
    (folder / "manifest.json").write_text(json.dumps(content), encoding="utf-8")


# -- what fits -------------------------------------------------------------------------------------------------------


def test_every_song_of_a_folder_is_counted(tmp_path):
    for name in ("a.pt", "b.pt", "ü c.pt"):
        save(tmp_path, name)
    (tmp_path / "notes.txt").write_text("no song")
    dataset = inspect_dataset(tmp_path)
    assert (dataset.folder, dataset.songs, dataset.condition_width, dataset.missing) == (tmp_path, 3, 8, ())


def test_songs_of_different_lengths_fit_together(tmp_path):
    save(tmp_path, "a.pt")
    frames = {"target_latents": torch.zeros(3, 64), "attention_mask": torch.ones(3)}
    conditions = {"encoder_hidden_states": torch.zeros(9, 8), "encoder_attention_mask": torch.ones(9)}
    save(tmp_path, "b.pt", a_song(**frames, **conditions, context_latents=torch.zeros(3, 128)))
    assert inspect_dataset(tmp_path).songs == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_songs_of_every_floating_type_fit(dtype, tmp_path):
    song = {key: value.to(dtype) if key in SONG_TENSORS else value for key, value in a_song().items()}
    assert inspect_dataset(save(tmp_path, song=song)).condition_width == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("mask", ["attention_mask", "encoder_attention_mask"])
def test_masks_of_every_type_fit(mask, dtype, tmp_path):
    """ACE-Step writes masks of latents in the type of the latents, and masks of conditions as bool or int64."""
    assert inspect_dataset(save(tmp_path, song=a_song(**{mask: a_song()[mask].to(dtype)}))).songs == 1


def test_songs_in_the_format_of_old_torch_fit(tmp_path):
    torch.save(a_song(), tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert inspect_dataset(tmp_path).condition_width == 8


# -- manifest --------------------------------------------------------------------------------------------------------


def test_a_manifest_names_songs_relative_to_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(save(tmp_path / "elsewhere", "a.pt", a_song(16)))
    data = save(tmp_path / "data", "a.pt")
    save(data / "more", "b.pt")
    save(data, "unlisted.pt", {"no": "song"})
    write_manifest(data, {"samples": ["a.pt", "more/b.pt"]})
    dataset = inspect_dataset(data)
    assert (dataset.songs, dataset.missing, dataset.condition_width) == (2, (), 8)


def test_a_manifest_names_songs_relative_to_where_upstream_was_started(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "data")
    write_manifest(tmp_path / "data", {"samples": ["data/a.pt"]})
    assert inspect_dataset(Path("data")).songs == 1


def test_a_manifest_names_songs_by_absolute_path(tmp_path):
    save(tmp_path)
    write_manifest(tmp_path, {"samples": [str(tmp_path / "a.pt")]})
    assert inspect_dataset(tmp_path).songs == 1


def test_every_entry_of_a_manifest_that_leads_out_of_the_folder_is_named(tmp_path):
    save(tmp_path / "songs")
    save(tmp_path / "data", "good.pt", a_song(8))
    out = [str(tmp_path / "songs" / "a.pt"), "../songs/a.pt"]
    write_manifest(tmp_path / "data", {"samples": [*out, "good.pt"]})
    with pytest.raises(Refusal) as refused:
        inspect_dataset(tmp_path / "data")
    assert all(f"{name} (manifest.json names it, and it lies outside" in str(refused.value) for name in out)
    assert "good.pt" not in str(refused.value)


def test_songs_that_are_there_twice_are_all_named(tmp_path):
    save(tmp_path, "a.pt")
    for copy in ("b (copy).pt", "c.pt"):
        (tmp_path / copy).write_bytes((tmp_path / "a.pt").read_bytes())
    save(tmp_path, "d.pt", a_song(8))
    with pytest.raises(Refusal) as refused:
        inspect_dataset(tmp_path)
    assert "b (copy).pt (the same bytes as a.pt), c.pt (the same bytes as a.pt)" in str(refused.value)
    assert "--allow-duplicates" in str(refused.value) and "d.pt" not in str(refused.value)
    assert inspect_dataset(tmp_path, allow_duplicates=True).songs == 4
    write_manifest(tmp_path, {"samples": ["d.pt", "a.pt", "d.pt"]})
    with pytest.raises(Refusal, match=r"d\.pt \(named 2 times in manifest\.json\)"):
        inspect_dataset(tmp_path)


def test_songs_say_for_which_model_they_were_made(tmp_path):
    assert made_for(tmp_path) is None
    (tmp_path / "preprocess_meta.json").write_text('{"model_variant": "turbo"}', encoding="utf-8")
    assert made_for(tmp_path) == "turbo"
    (tmp_path / "preprocess_meta.json").write_text("{", encoding="utf-8")
    assert made_for(tmp_path) is None


def test_songs_that_a_manifest_names_and_nobody_has_are_reported(tmp_path):
    save(tmp_path)
    write_manifest(tmp_path, {"samples": ["gone.pt", "a.pt", "lost.pt"]})
    dataset = inspect_dataset(tmp_path)
    assert (dataset.songs, dataset.missing) == (1, ("gone.pt", "lost.pt"))


def test_a_manifest_of_nothing_but_missing_songs_is_refused_with_their_number(tmp_path):
    save(tmp_path)
    write_manifest(tmp_path, {"samples": ["gone.pt", "lost.pt"]})
    with pytest.raises(Refusal, match=r"No songs in .*manifest\.json names 2 that are not there"):
        inspect_dataset(tmp_path)


@pytest.mark.parametrize("name", ["", ".", "\0", "x" * 300, "a.pt/b.pt"], ids=lambda name: repr(name)[:8])
def test_a_name_that_no_file_can_have_is_a_missing_song(name, tmp_path):
    save(tmp_path)
    write_manifest(tmp_path, {"samples": ["a.pt", name]})
    assert inspect_dataset(tmp_path).missing == (name,)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"samples": ["\xff"]}', b"[" * 100_000, b"1" * 5000],
    ids=["empty", "cut off", "not UTF-8", "too deep", "too long a number"],
)
def test_a_manifest_that_is_no_json_is_refused(content, tmp_path):
    (save(tmp_path) / "manifest.json").write_bytes(content)
    with pytest.raises(Refusal, match=r"manifest\.json cannot be read as JSON.*Delete it"):
        inspect_dataset(tmp_path)


@pytest.mark.parametrize("content", [["a.pt"], "a.pt", None, {"samples": "a.pt"}, {"samples": [{"file": "a.pt"}]}])
def test_a_manifest_without_a_list_of_names_is_refused(content, tmp_path):
    write_manifest(save(tmp_path), content)
    with pytest.raises(Refusal, match=r'no list of file names under "samples".*Delete it'):
        inspect_dataset(tmp_path)


# -- what does not fit -----------------------------------------------------------------------------------------------


def test_a_missing_folder_is_refused_by_its_name(tmp_path):
    with pytest.raises(Refusal, match=r"No dataset folder .*nowhere"):
        inspect_dataset(tmp_path / "nowhere")
    with pytest.raises(Refusal, match=r"No dataset folder .*a\.pt"):
        inspect_dataset(save(tmp_path) / "a.pt")


def test_a_folder_without_songs_is_refused(tmp_path):
    (tmp_path / "song.wav").write_bytes(b"RIFF")
    with pytest.raises(Refusal, match=r"No songs in "):
        inspect_dataset(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no tensor at all", b"PK\x03\x04", b"\x80\x02]q\x00."])
def test_a_file_that_is_no_song_is_refused_by_its_name(content, tmp_path):
    (tmp_path / "bad.pt").write_bytes(content)
    with pytest.raises(Refusal, match=r"bad\.pt \(.*\)\. Preprocess"):
        inspect_dataset(tmp_path)


def test_a_truncated_song_is_refused_by_its_name(tmp_path):
    whole = (save(tmp_path / "whole") / "a.pt").read_bytes()
    for kept in (1, 2, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.pt").write_bytes(whole[:kept])
        with pytest.raises(Refusal, match=r"cut\.pt \(cannot be read: "):
            inspect_dataset(tmp_path)


@pytest.mark.parametrize("song", [torch.zeros(3), [torch.zeros(3)], "text"])
def test_a_file_of_something_else_is_refused_with_what_it_is(song, tmp_path):
    with pytest.raises(Refusal, match=rf"a\.pt \(holds a {type(song).__name__}, expected a dictionary of tensors\)"):
        inspect_dataset(save(tmp_path, song=song))


@pytest.mark.parametrize("key", SONG_TENSORS)
def test_a_missing_tensor_is_named(key, tmp_path):
    for value in (None, [1.0, 2.0]):
        with pytest.raises(Refusal, match=rf"a\.pt \(no tensor {key}\)"):
            inspect_dataset(save(tmp_path, song=a_song(**{key: value})))


@pytest.mark.parametrize(("key", "dimensions"), SONG_TENSORS.items())
def test_a_tensor_of_other_dimensions_is_shown(key, dimensions, tmp_path):
    wrong = torch.zeros([1] * (dimensions + 1))
    with pytest.raises(Refusal, match=rf"{key} has shape \[1, .*\], expected {counted(dimensions, 'dimension')}\)"):
        inspect_dataset(save(tmp_path, song=a_song(**{key: wrong})))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"context_latents": torch.zeros(7, 128)}, "context_latents has 7 rows, expected 10 as in target_latents"),
        ({"attention_mask": torch.ones(9)}, "attention_mask has 9 rows, expected 10 as in target_latents"),
        (
            {"encoder_attention_mask": torch.ones(5)},
            "encoder_attention_mask has 5 rows, expected 4 as in encoder_hidden_states",
        ),
        ({"attention_mask": torch.zeros(10)}, "attention_mask is 0 everywhere, expected 1"),
        ({"encoder_attention_mask": torch.zeros(4).bool()}, "encoder_attention_mask is 0 everywhere, expected 1"),
        ({"attention_mask": torch.full((10,), 0.5)}, "attention_mask has the value 0.5, expected only 0 and 1"),
        (
            {"encoder_attention_mask": torch.tensor([1, 1, 2, 0])},
            "encoder_attention_mask has the value 2, expected only 0 and 1",
        ),
        (
            {"target_latents": torch.zeros(10, 64, requires_grad=True)},
            "target_latents requires gradients, expected a tensor saved after detach()",
        ),
        ({"target_latents": torch.zeros(10, 64).bool()}, "target_latents is bool, expected float32, float16"),
        ({"context_latents": torch.zeros(10, 128).char()}, "context_latents is int8, expected float32, float16"),
        ({"encoder_hidden_states": torch.zeros(4, 8).cfloat()}, "encoder_hidden_states is complex64, expected float"),
        ({"encoder_attention_mask": torch.ones(4).cfloat()}, "encoder_attention_mask is complex64, expected float"),
        ({"target_latents": torch.zeros(10, 64).to_sparse()}, "target_latents is sparse float32, expected float32"),
        ({"target_latents": torch.zeros(10, 65)}, r"target_latents has shape \[10, 65\], expected 64 channels"),
        ({"context_latents": torch.zeros(10, 65)}, r"context_latents has shape \[10, 65\], expected 128 channels"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_tensors_that_do_not_belong_together_are_named(changed, says, tmp_path):
    save(tmp_path, "good.pt")
    with pytest.raises(Refusal, match=rf": bad\.pt \({says}.*\)\. Preprocess"):
        inspect_dataset(save(tmp_path, "bad.pt", a_song(**changed)))


def test_songs_of_different_widths_are_refused_by_name(tmp_path):
    for name, width in (("a.pt", 8), ("b.pt", 16), ("c.pt", 8)):
        save(tmp_path, name, a_song(width))
    with pytest.raises(Refusal, match=r": b\.pt \(conditions of width 16, most have 8\)\."):
        inspect_dataset(tmp_path)


def test_one_bad_song_among_good_ones_is_refused(tmp_path):
    save(tmp_path, "a.pt")
    save(tmp_path, "z.pt", a_song(context_latents=None))
    with pytest.raises(Refusal, match=r": z\.pt \(no tensor context_latents\)\."):
        inspect_dataset(tmp_path)


def test_of_many_bad_songs_every_one_is_named(tmp_path):
    for i in range(8):
        (tmp_path / f"{i}.pt").write_bytes(b"")
    with pytest.raises(Refusal) as refused:
        inspect_dataset(tmp_path)
    assert all(f"{i}.pt (cannot be read" in str(refused.value) for i in range(8))


# -- what is no file -------------------------------------------------------------------------------------------------


def test_a_folder_that_is_named_like_a_song_is_named(tmp_path):
    save(tmp_path)
    (tmp_path / "b.pt").mkdir()
    with pytest.raises(Refusal, match=r": b\.pt \(is a folder, not a file\)\."):
        inspect_dataset(tmp_path)
    assert [file.name for file in songs_in(tmp_path)] == ["a.pt"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="makes a named pipe")
def test_a_named_pipe_is_named_and_never_opened(tmp_path):
    save(tmp_path)
    os.mkfifo(tmp_path / "b.pt")
    with pytest.raises(Refusal, match=r": b\.pt \(is a named pipe, not a file\)\."):
        inspect_dataset(tmp_path)
    (tmp_path / "b.pt").unlink()
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(Refusal, match=r"manifest\.json is a named pipe, not a file\. Delete it"):
        inspect_dataset(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="makes symbolic links")
def test_links_are_told_apart(tmp_path):
    save(tmp_path / "elsewhere")
    data = save(tmp_path / "data", "a.pt", a_song(context_latents=torch.ones(10, 128)))
    (data / "b.pt").symlink_to(tmp_path / "elsewhere" / "a.pt")
    assert inspect_dataset(data).links == (data / "b.pt",)
    (data / "c.pt").symlink_to(data / "a.pt")
    assert inspect_dataset(data, allow_duplicates=True).links == (data / "b.pt",)
    (data / "c.pt").unlink()
    (data / "c.pt").symlink_to(tmp_path / "gone.pt")
    with pytest.raises(Refusal, match=r": c\.pt \(is a link to .*gone\.pt, which is not there\)\."):
        inspect_dataset(data)


def test_the_companion_files_of_macos_are_no_songs(tmp_path):
    save(tmp_path)
    (tmp_path / "._a.pt").write_bytes(b"\x00\x05\x16\x07")
    assert [file.name for file in songs_in(tmp_path)] == ["a.pt"]
    assert inspect_dataset(tmp_path).songs == 1
    write_manifest(tmp_path, {"samples": ["a.pt", "._a.pt"]})
    assert inspect_dataset(tmp_path).songs == 1


def test_a_folder_of_audio_is_told_how_to_become_songs(tmp_path):
    for name in ("a.wav", "b.WAV", "c.mp3", "cover.png"):
        (tmp_path / name).touch()
    with pytest.raises(
        Refusal, match=r"No songs in .*: .*, found audio \(1 \.mp3, 2 \.wav\).*Prepare it first"
    ) as told:
        inspect_dataset(tmp_path)
    assert "acestep-train prepare AUDIO_DIR" in str(told.value)


# -- what must never happen ------------------------------------------------------------------------------------------


class Mine:
    """Runs a command when somebody unpickles it."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def write_plain_pickle(file, payload):
    file.write_bytes(pickle.dumps(payload))


def write_zipped_pickle(file, payload):
    torch.save({}, file)
    with zipfile.ZipFile(file) as whole:
        entries = {name: whole.read(name) for name in whole.namelist()}
    with zipfile.ZipFile(file, "w") as changed:
        for name, content in entries.items():
            changed.writestr(name, pickle.dumps(payload, protocol=2) if name.endswith("data.pkl") else content)


@pytest.mark.parametrize("write", [write_plain_pickle, write_zipped_pickle])
def test_code_in_a_song_is_never_executed(write, tmp_path):
    target, data = tmp_path / "executed", tmp_path / "data"
    data.mkdir()
    write(data / "mine.pt", {"target_latents": Mine(target)})
    with pytest.raises(Refusal, match=r"mine\.pt \(cannot be read"):
        inspect_dataset(data)
    assert not target.exists()

    with contextlib.suppress(RuntimeError):
        torch.load(data / "mine.pt", weights_only=False)
    assert target.exists(), "the same file would run its code if it were trusted"
