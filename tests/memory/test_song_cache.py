"""Songs in RAM: same losses, adapter and random state, bit for bit; files are read once, and again when they change."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sidestep_plugin import Refusal, attach
from sidestep_plugin.engine.shapes import sampler_style
from sidestep_plugin.memory import free_memory, song_cache
from sidestep_plugin.memory.song_cache import SongCache


@pytest.fixture
def reads(trainer, monkeypatch):
    """The files that upstream's dataset has read, one entry per call of ``torch.load``."""
    if hasattr(trainer.TrainingConfig(), "sample_cache_size"):
        pytest.skip("this version of ACE-Step keeps songs itself")
    module = sys.modules[trainer.PreprocessedDataModule.__module__]
    names, original = [], torch.load

    def load(file, *args, **kwargs):
        names.append(Path(file).name)
        return original(file, *args, **kwargs)

    # Its own view of torch: the trainer reads checkpoints with torch.load, too.
    monkeypatch.setattr(module, "torch", SeesLoad(load))
    return names


class SeesLoad:
    def __init__(self, load):
        self.load = load

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.mark.parametrize("kind, lightning", [("lora", True), ("lokr", True), ("lora", False)])
def test_each_song_is_read_once_and_nothing_else_changes(
    trainer, train, reads, equal_bits, monkeypatch, capsys, kind, lightning
):
    if not lightning:
        if not hasattr(trainer, "LIGHTNING_AVAILABLE"):
            pytest.skip("this version of ACE-Step has no such switch")
        if sampler_style(trainer.sample_discrete_timestep) == "device and dtype":
            pytest.skip("this version of ACE-Step needs a model in bf16 without Lightning")
        monkeypatch.setattr(trainer, "LIGHTNING_AVAILABLE", False)
    plain = train("base", kind, max_epochs=3, options={"song_cache": "off"})
    assert len(reads) == 18
    assert "Songs:" not in capsys.readouterr().out
    reads.clear()
    kept = train("base", kind, max_epochs=3)
    assert sorted(reads) == [f"song_{number:02d}.pt" for number in range(1, 7)]
    assert equal_bits(plain, kept)
    out = capsys.readouterr().out
    assert out.count("Songs: kept in RAM after the first epoch (0.1 MiB; same result, bit for bit)") == 1


def test_only_as_much_as_was_allowed(train, reads, equal_bits, capsys):
    plain = train("base", options={"song_cache": "off"})
    reads.clear()
    kept = train("base", options={"song_cache": "45kB"})
    assert 6 < len(reads) < 12 and equal_bits(plain, kept)
    assert "Songs: 0.0 MiB of 0.1 MiB kept in RAM" in capsys.readouterr().out


def test_one_epoch_keeps_nothing(train, reads, capsys):
    train("base", max_epochs=1)
    assert len(reads) == 6 and "kept in RAM" not in capsys.readouterr().out
    train("base", max_epochs=1, options={"song_cache": "4GB"})
    assert "Note: --song-cache 4GB has no effect: in one epoch each song is read once." in capsys.readouterr().out


@pytest.mark.parametrize(
    "free, workers, said",
    [
        (None, 0, "this system does not say how much is free"),
        (2**33, 2, "because 2 processes read them (--num-workers 0 keeps them)"),
    ],
)
def test_where_nothing_can_be_kept_it_is_said(monkeypatch, checkout, free, workers, said):
    monkeypatch.setattr(song_cache, "free_memory", lambda: free)
    run = SimpleNamespace(
        options={"song_cache": "auto"},
        tensor_dir=checkout.tensors,
        training_config=SimpleNamespace(num_workers=workers, max_epochs=2),
        state={},
        engine=SimpleNamespace(songs=sorted(checkout.tensors.glob("*.pt"))),
    )
    (line,) = song_cache.acestep_run_started(run)
    assert said in line and not run.state


def test_half_of_the_free_memory_and_a_warning_above_it(monkeypatch, checkout):
    monkeypatch.setattr(song_cache, "free_memory", lambda: 60_000)
    run = SimpleNamespace(
        options={"song_cache": "auto"},
        tensor_dir=checkout.tensors,
        training_config=SimpleNamespace(),
        state={},
        engine=SimpleNamespace(at_end=lambda undo: None, songs=sorted(checkout.tensors.glob("*.pt"))),
    )
    song_cache.acestep_run_started(run)
    (cache,) = run.state.values()
    assert cache.room == 30_000
    run.options["song_cache"] = "4GB"
    assert "more than the free memory" in song_cache.acestep_run_started(run)[0]
    (cache,) = run.state.values()
    assert cache.room == 4_000_000_000


@pytest.mark.parametrize("text, size", [("4GB", 4e9), ("1.5 GiB", 1.5 * 2**30), ("300mb", 3e8), ("2g", 2**31)])
def test_a_size_has_a_unit(text, size):
    assert song_cache._bytes_in(text) == size


@pytest.mark.parametrize("value", ["4", 4, "0GB", "-1GB", "GB", "lots", "", "4 apples", "nanGB", True, "1e3GB"])
def test_anything_else_is_refused(trainer, value):
    with pytest.raises(Refusal, match="Option song_cache: .*expected auto, off or a size such as 4GB"):
        attach(trainer, options={"song_cache": value})


# -- the cache itself ------------------------------------------------------------------------------------------------


@pytest.fixture
def song(checkout, tmp_path):
    """A file, and a function that reads it as upstream does and counts."""
    file = tmp_path / "song.pt"
    shutil.copyfile(checkout.tensors / "song_01.pt", file)

    def read():
        read.count += 1
        return torch.load(file, weights_only=True)

    read.count = 0
    return file, read


def test_a_file_that_changes_is_read_again(song):
    file, read = song
    cache = SongCache(10**6)
    first = cache.read(str(file), read)
    assert cache.read(str(file), read)["target_latents"] is first["target_latents"] and read.count == 1
    changed = {name: value + 1 if isinstance(value, torch.Tensor) else value for name, value in first.items()}
    torch.save(changed, file)
    os.utime(file, ns=(1, 1))
    assert torch.equal(cache.read(str(file), read)["target_latents"], changed["target_latents"]) and read.count == 2


def test_a_song_that_somebody_wrote_to_is_read_again(song):
    file, read = song
    cache = SongCache(10**6)
    first = cache.read(str(file), read)
    before = first["target_latents"].clone()
    first["target_latents"].zero_()
    first["metadata"]["caption"] = "another"
    again = cache.read(str(file), read)
    assert torch.equal(again["target_latents"], before) and again["metadata"]["caption"] != "another"


def test_what_is_handed_out_belongs_to_the_caller(song):
    file, read = song
    cache = SongCache(10**6)
    for _ in range(2):
        handed = cache.read(str(file), read)
        handed["metadata"]["caption"] = "another"
        del handed["attention_mask"]
    whole = cache.read(str(file), read)
    assert "attention_mask" in whole and whole["metadata"]["caption"] != "another" and read.count == 1


def test_room_is_used_and_given_back(song):
    file, read = song
    cache = SongCache(10**6)
    cache.read(str(file), read)
    used = 10**6 - cache.room
    assert used == sum(value.nbytes for value in read().values() if isinstance(value, torch.Tensor))
    os.utime(file, ns=(1, 1))
    cache.read(str(file), read)
    assert cache.room == 10**6 - used, "read again, counted once"
    cache.clear()
    cache.read(str(file), read)
    cache.read(str(file), read)
    assert read.count == 5, "after the end nothing is kept"


def test_no_room_no_file_and_no_name(song, tmp_path):
    file, read = song
    for cache, name in (
        (SongCache(0), str(file)),
        (SongCache(10**6), str(tmp_path / "gone")),
        (SongCache(10**6), None),
    ):
        before = read.count
        cache.read(name, read)
        cache.read(name, read)
        assert read.count == before + 2


def test_after_the_training_the_memory_is_free(train, monkeypatch):
    made = []
    original = SongCache.__init__
    monkeypatch.setattr(SongCache, "__init__", lambda self, room: made.append(self) or original(self, room))
    train("base")
    assert len(made) == 1 and made[0]._kept == {} and made[0].room == 0


# -- free memory -----------------------------------------------------------------------------------------------------


def test_free_memory_is_a_sensible_number():
    free = free_memory.free_memory()
    if sys.platform in ("linux", "win32"):
        assert free is not None and 2**20 < free < 2**50


def test_the_limit_of_a_job_counts(tmp_path, monkeypatch):
    group = tmp_path / "groups" / "slurm" / "job_7"
    group.mkdir(parents=True)
    membership = tmp_path / "membership"
    membership.write_text("0::/slurm/job_7\n", encoding="utf-8")
    monkeypatch.setattr(free_memory, "_MEMBERSHIP", membership)
    monkeypatch.setattr(free_memory, "_GROUPS", tmp_path / "groups")
    for folder, limit in ((group, "max"), (group.parent, "5000000")):
        (folder / "memory.max").write_text(f"{limit}\n", encoding="ascii")
        (folder / "memory.current").write_text("4000000\n", encoding="ascii")
        (folder / "memory.stat").write_text("anon 1\ninactive_file 500000\n", encoding="ascii")
    assert free_memory.free_memory() == 1_500_000


def test_unknown_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(free_memory, "_MEMBERSHIP", tmp_path / "nothing")
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert free_memory.free_memory() is None
