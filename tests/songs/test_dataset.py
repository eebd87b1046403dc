"""A folder of preprocessed songs, looked at before anything is loaded."""

import contextlib
import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from sidestep_plugin import Refusal
from sidestep_plugin.songs.dataset import SONG_TENSORS, inspect_dataset, made_for


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


def write_manifest(folder, content):
    (folder / "manifest.json").write_text(json.dumps(content), encoding="utf-8")


# -- what fits -------------------------------------------------------------------------------------------------------


def test_every_song_of_a_folder_is_counted(tmp_path):
    for name in ("a.pt", "b.pt", "ü c.pt"):
        save(tmp_path, name)
    (tmp_path / "notes.txt").write_text("no song")
    (tmp_path / "folder.pt").mkdir()
    dataset = inspect_dataset(tmp_path)
    assert (dataset.folder, dataset.songs, dataset.condition_width, dataset.missing) == (tmp_path, 3, 8, ())


def test_songs_of_different_lengths_fit_together(tmp_path):
    save(tmp_path, "a.pt")
    save(tmp_path, "b.pt", a_song(target_latents=torch.zeros(3, 64), encoder_hidden_states=torch.zeros(9, 8)))
    assert inspect_dataset(tmp_path).songs == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_songs_of_every_floating_type_fit(dtype, tmp_path):
    song = {key: value.to(dtype) if key in SONG_TENSORS else value for key, value in a_song().items()}
    assert inspect_dataset(save(tmp_path, song=song)).condition_width == 8


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
    with pytest.raises(Refusal, match=rf"{key} has shape \[1, .*\], expected {dimensions} dimensions"):
        inspect_dataset(save(tmp_path, song=a_song(**{key: wrong})))


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
