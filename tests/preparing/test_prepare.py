"""Audio and texts become songs: with the conditions of a generation, the same bytes every time, nothing made twice."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from preparing.conftest import write_texts, write_wav
from preparing.parts import digests, handed_to_the_decoder, songs_of

from sidestep_plugin.errors import Refusal
from sidestep_plugin.preparing import job
from sidestep_plugin.songs.dataset import inspect_dataset


def test_conditions_are_those_that_the_app_generates_with(prepare, music, app):
    """Promise 8, from the audio to the file."""
    result = prepare(music)
    assert (result.done.made, result.done.failed) == (3, ())
    handler = app()
    for name, song in songs_of(result.folder).items():
        words = song["metadata"]["prepared"]["words"]
        states, context = handed_to_the_decoder(handler, words)
        assert torch.equal(song["encoder_hidden_states"], states), name
        frames = len(song["target_latents"])
        assert torch.equal(song["context_latents"], context[:frames]), name
        assert bool((song["encoder_attention_mask"] == 1).all()) and bool((song["attention_mask"] == 1).all())


def test_names_come_from_paths_and_the_manifest_lists_them(prepare, music):
    result = prepare(music)
    manifest = json.loads((result.folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["samples"] == ["rock__one.pt", "three.pt", "two.pt"] and manifest["num_samples"] == 3
    dataset = inspect_dataset(result.folder)
    assert dataset.songs == 3 and not dataset.missing
    meta = json.loads((result.folder / "preprocess_meta.json").read_text(encoding="utf-8"))
    assert meta["model_variant"] == "acestep-v15-base"
    assert not [file.name for file in result.folder.iterdir() if file.name.startswith(".")]


def test_a_song_says_what_it_was_told_and_how_it_was_made(prepare, music):
    song = songs_of(prepare(music).folder)["rock__one"]
    told = song["metadata"]
    assert told["caption"] == "loud guitars" and told["lyrics"] == "[Verse]\nOne and two" and told["bpm"] == 120
    assert told["audio_path"] == "rock/one.wav", "no local path"
    assert told["preprocess_mode"] == "lora" and told["duration"] == 2
    made = told["prepared"]
    assert made["form"] == "generated" and made["model"] == "acestep-v15-base"
    assert made["frames"] == len(song["target_latents"]) == 50 and made["seconds"] == 2.0
    assert "loud guitars" in made["prompt"] and made["lyrics"].startswith("# Languages\n")
    rows = made["prompt_tokens"] + made["lyric_tokens"] + 1
    assert len(song["encoder_hidden_states"]) == rows and made["caption_cut"] == made["lyrics_cut"] == 0
    for name in ("encoders", "condition_encoder", "text_encoder", "tokenizer", "silence", "latents"):
        assert len(made[name]) == 64, name
    assert made["sound"]["vae"] and made["machine"]["dtype"] == "float32" and made["machine"]["attention"] == "sdpa"


@pytest.mark.slow
def test_two_runs_write_the_same_bytes(prepare, music, tmp_path):
    one = prepare(music, tmp_path / "a")
    torch.manual_seed(99)
    two = prepare(music, tmp_path / "b")
    assert digests(one.folder) == digests(two.folder)


def test_no_random_state_is_different_afterwards(prepare, music):
    state = torch.get_rng_state()
    prepare(music)
    assert torch.equal(state, torch.get_rng_state())


def nothing_loads(monkeypatch, *names):
    def fail(*_, **__):
        raise AssertionError("nothing is to be loaded")

    for name in names:
        monkeypatch.setattr(job, name, fail)


LOADERS = ("load_vae", "load_condition_encoder", "load_text_encoder", "load_tokenizer")


def test_running_again_does_nothing(prepare, music, monkeypatch):
    first = prepare(music)
    before = digests(first.folder)
    times = {file.name: file.stat().st_mtime_ns for file in first.folder.iterdir()}
    nothing_loads(monkeypatch, *LOADERS)
    again = prepare(music)
    assert (again.done.made, again.done.renewed, again.done.kept) == (0, 0, 3)
    assert digests(again.folder) == before
    assert {file.name: file.stat().st_mtime_ns for file in first.folder.iterdir()} == times


@pytest.mark.slow
def test_a_changed_caption_makes_only_its_conditions_anew(prepare, music, monkeypatch):
    first = prepare(music)
    before, songs = digests(first.folder), songs_of(first.folder)
    write_texts(music, "two", caption="a loud piano")
    nothing_loads(monkeypatch, "load_vae")
    again = prepare(music)
    assert (again.done.made, again.done.renewed, again.done.kept) == (0, 1, 2)
    after, now = digests(again.folder), songs_of(again.folder)
    assert {name for name in after if after[name] != before[name]} == {"two.pt"}
    assert torch.equal(now["two"]["target_latents"], songs["two"]["target_latents"])
    assert now["two"]["metadata"]["caption"] == "a loud piano"
    assert now["two"]["metadata"]["prepared"]["sound"] == songs["two"]["metadata"]["prepared"]["sound"]


@pytest.mark.slow
def test_a_changed_song_is_made_anew(prepare, music):
    first = songs_of(prepare(music).folder)
    write_wav(music / "two.wav", 3.0, seed=77)
    again = prepare(music)
    assert (again.done.made, again.done.renewed, again.done.kept) == (1, 0, 2)
    assert not torch.equal(songs_of(again.folder)["two"]["target_latents"], first["two"]["target_latents"])


def test_a_removed_song_is_named_and_no_longer_listed(prepare, music):
    prepare(music)
    (music / "two.wav").unlink()
    again = prepare(music)
    assert again.done.removed == ("two.pt",)
    manifest = json.loads((again.folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["samples"] == ["rock__one.pt", "three.pt"]
    assert (again.folder / "two.pt").is_file(), "nothing is deleted"


@pytest.mark.slow
def test_another_model_makes_new_conditions_and_keeps_the_latents(prepare, music, monkeypatch):
    first = songs_of(prepare(music).folder)
    nothing_loads(monkeypatch, "load_vae")
    again = prepare(music, model="turbo")
    assert again.done.renewed == 3
    for name, song in songs_of(again.folder).items():
        assert torch.equal(song["target_latents"], first[name]["target_latents"])
        assert not torch.equal(song["encoder_hidden_states"], first[name]["encoder_hidden_states"])
        assert song["metadata"]["prepared"]["model"] == "acestep-v15-turbo"


@pytest.mark.slow
def test_the_same_model_under_another_name_is_said_in_the_songs(prepare, music, checkpoints):
    """Training refuses songs of another model by its name, so a name that is wrong would be a dead end."""
    prepare(music)
    copy = checkpoints / "my-tune-of-base"
    shutil.copytree(checkpoints / "acestep-v15-base", copy)
    again = prepare(music, model="my-tune-of-base")
    shutil.rmtree(copy)
    assert again.done.renewed == 3
    assert {song["metadata"]["prepared"]["model"] for song in songs_of(again.folder).values()} == {"my-tune-of-base"}


@pytest.mark.slow
def test_low_memory_writes_the_same_bytes_and_loads_one_after_the_other(prepare, music, tmp_path, monkeypatch):
    one = prepare(music, tmp_path / "a")
    loaded = []

    def noted(name, original):
        def load(*args):
            loaded.append(name)
            return original(*args)

        return load

    for name in LOADERS:
        monkeypatch.setattr(job, name, noted(name, getattr(job, name)))
    encode = job.encode_audio
    monkeypatch.setattr(job, "encode_audio", lambda *args: (loaded.append("sound"), encode(*args))[1])
    two = prepare(music, tmp_path / "b", low_memory=True)
    assert digests(one.folder) == digests(two.folder)
    assert loaded[:4] == ["load_vae", "sound", "sound", "sound"] and "load_condition_encoder" in loaded[4:]


def test_the_decoder_is_given_up_before_anything_is_on_the_device(prepare, music, monkeypatch):
    seen = []
    original = job.make_handler

    def make(*args, **parts):
        seen.append(parts["model"])
        return original(*args, **parts)

    monkeypatch.setattr(job, "make_handler", make)
    prepare(music)
    assert [model.decoder for model in seen] == [None]


class Killed(BaseException):
    pass


_STAGES = [
    (stage, number, low) for stage in ("encode_audio", "encode", "write_song") for number in (1, 2, 3) for low in (0, 1)
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage, number, low_memory",
    [pytest.param(*case, marks=() if case[1:] == (2, 0) else pytest.mark.slow) for case in _STAGES],
)
def test_killed_and_started_again_is_as_if_nothing_had_happened(
    prepare, music, tmp_path, monkeypatch, stage, number, low_memory
):
    whole = prepare(music, tmp_path / "a")
    count = iter(range(1, 100))
    original = getattr(job, stage)

    def kill(*args):
        if next(count) == number:
            raise Killed
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(job, stage, kill)
        with pytest.raises(Killed):
            prepare(music, tmp_path / "b", low_memory=low_memory)
    assert not (tmp_path / "b" / "manifest.json").exists(), "the list of songs comes last"
    finished = {name for name in digests(tmp_path / "b") if name.endswith(".pt") and not name.startswith(".")}
    assert all(digests(tmp_path / "b")[name] == digests(whole.folder)[name] for name in finished)
    again = prepare(music, tmp_path / "b", low_memory=low_memory)
    assert digests(again.folder) == digests(whole.folder)
    assert again.done.kept == len(finished)


def test_what_a_kill_left_half_written_is_removed(prepare, music, tmp_path):
    folder = tmp_path / "songs"
    folder.mkdir()
    (folder / ".two.pt.abcd.tmp").write_bytes(b"half")
    (folder / "two.pt").write_bytes(b"a full disk cut this")
    result = prepare(music)
    assert result.done.made == 3 and not list(folder.glob(".*"))


# -- as upstream ------------------------------------------------------------------------------------------------------


def test_upstreams_conditions_can_be_made_for_comparison(prepare, music, app, checkout):
    if checkout.real:
        pytest.importorskip("acestep.training.dataset_builder_modules.preprocess_context")
    from importlib import import_module

    result = prepare(music, conditions="upstream")
    builder = import_module("acestep.training.dataset_builder").DatasetBuilder()
    sample_class = import_module("acestep.training.dataset_builder_modules.models").AudioSample
    handler = app()
    for name, song in songs_of(result.folder).items():
        words = song["metadata"]["prepared"]["words"]
        audio = music / song["metadata"]["audio_path"]
        builder.samples = [
            sample_class(
                audio_path=str(audio),
                filename=audio.name,
                caption=words["caption"],
                lyrics=words["lyrics"],
                bpm=words["bpm"],
                keyscale=words["keyscale"],
                timesignature=words["timesignature"],
                language=words["language"],
                duration=int(words["seconds"]),
                labeled=True,
            )
        ]
        torch.manual_seed(int(song["metadata"]["prepared"]["sound"]["audio"][:15], 16))
        paths, status = builder.preprocess_to_tensors(handler, str(result.folder.parent / "theirs"))
        assert len(paths) == 1, status
        theirs = torch.load(paths[0], weights_only=True)
        for tensor in ("target_latents", "encoder_hidden_states", "encoder_attention_mask", "context_latents"):
            assert torch.equal(song[tensor], theirs[tensor]), (name, tensor)
        assert song["metadata"]["prepared"]["form"] == "upstream"


# -- renewing ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_renewed_songs_are_prepared_songs_without_their_audio(prepare, music, tmp_path):
    upstreams = prepare(music, tmp_path / "old", conditions="upstream")
    prepared = prepare(music, tmp_path / "new")
    shutil.rmtree(music)
    renewed = prepare(upstreams.folder, tmp_path / "renewed", renew=True)
    assert renewed.done.renewed == 3
    assert digests(renewed.folder) == digests(prepared.folder)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lora", "lokr"])
def test_songs_of_the_apps_own_preprocessing_are_renewed(prepare, music, tmp_path, app, mode):
    from importlib import import_module

    try:
        sample_class = import_module("acestep.training.dataset_builder_modules.models").AudioSample
    except ModuleNotFoundError:
        pytest.skip("this version's preprocessing is one function")
    builder = import_module("acestep.training.dataset_builder").DatasetBuilder()
    builder.samples = [
        sample_class(
            audio_path=str(music / "two.wav"),
            filename="two.wav",
            caption="a quiet piano",
            lyrics="[Verse]\nla",
            language="en",
            bpm=70,
            keyscale="C major",
            timesignature="4",
            duration=3,
            labeled=True,
        )
    ]
    try:
        paths, status = builder.preprocess_to_tensors(app(), str(tmp_path / "old"), preprocess_mode=mode)
    except TypeError:
        pytest.skip("this version has no modes")
    assert len(paths) == 1, status
    old = torch.load(paths[0], weights_only=True)
    renewed = prepare(tmp_path / "old", renew=True)
    (song,) = songs_of(renewed.folder).values()
    states, context = handed_to_the_decoder(app(), song["metadata"]["prepared"]["words"])
    assert torch.equal(song["encoder_hidden_states"], states)
    assert torch.equal(song["context_latents"], context[: len(old["target_latents"])])
    assert torch.equal(song["target_latents"], old["target_latents"])
    assert not torch.equal(song["context_latents"][:, :64], song["target_latents"])
    assert song["metadata"]["audio_path"] == "two.wav", "no local path"


@pytest.mark.slow
def test_renewing_again_does_nothing(prepare, music, tmp_path, monkeypatch):
    old = prepare(music, tmp_path / "old")
    prepare(old.folder, tmp_path / "new", renew=True)
    nothing_loads(monkeypatch, *LOADERS)
    assert prepare(old.folder, tmp_path / "new", renew=True).done.kept == 3


# -- the trigger word -------------------------------------------------------------------------------------------------


def test_the_trigger_word_is_in_the_caption_the_prompt_and_the_manifest(prepare, music):
    from sidestep_plugin.songs.song_text import Trigger

    result = prepare(music, trigger=Trigger("zxsound", "after"))
    for song in songs_of(result.folder).values():
        assert song["metadata"]["caption"].endswith(", zxsound")
        made = song["metadata"]["prepared"]
        assert made["trigger"] == "zxsound" and made["trigger_position"] == "after" and "zxsound" in made["prompt"]
    manifest = json.loads((result.folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["metadata"]["custom_tag"] == "zxsound" and manifest["metadata"]["tag_position"] == "append"


# -- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_song_that_cannot_be_read_is_named_and_the_others_are_made(prepare, music):
    (music / "broken.wav").write_bytes(b"RIFF but nothing else in it that makes sense, at all, really")
    result = prepare(music)
    assert result.done.made == 3
    ((name, reason),) = result.done.failed
    assert name == "broken.wav" and reason
    manifest = json.loads((result.folder / "manifest.json").read_text(encoding="utf-8"))
    assert "broken.pt" not in manifest["samples"]


def test_strict_refuses_songs_with_problems_before_anything_is_loaded(prepare, music, monkeypatch):
    write_wav(music / "bare.wav", 12.0)
    nothing_loads(monkeypatch, *LOADERS)
    with pytest.raises(Refusal, match=r"(?s)--strict.*bare\.wav.*caption"):
        prepare(music, strict=True)


def test_songs_of_others_in_the_output_folder_are_not_touched(prepare, music, checkout):
    before = digests(checkout.tensors)
    with pytest.raises(Refusal, match=r"holds songs that prepare has not made.*--renew"):
        prepare(music, checkout.tensors)
    assert digests(checkout.tensors) == before


def test_the_output_folder_must_not_be_the_source(prepare, music):
    with pytest.raises(Refusal, match="is the folder that is read"):
        prepare(music, music)


def test_a_second_job_in_the_same_folder_is_refused(prepare, music, monkeypatch):
    inner = []

    def second(*args):
        if not inner:
            inner.append(None)
            with pytest.raises(Refusal, match="Another program is preparing songs") as refused:
                prepare(music)
            inner[0] = refused
        return original(*args)

    original = job.write_song
    monkeypatch.setattr(job, "write_song", second)
    assert prepare(music).done.made == 3 and inner[0] is not None


def test_no_text_encoder_is_said_with_what_to_do(prepare, music, checkpoints, tmp_path):
    shutil.copytree(checkpoints, tmp_path / "bare", ignore=shutil.ignore_patterns("Qwen3*"))
    from sidestep_plugin.preparing.request import PrepareRequest

    request = PrepareRequest(music, "base", tmp_path / "songs", checkpoint_dir=tmp_path / "bare", device="cpu")
    with pytest.raises(Refusal, match=r"No text encoder.*acestep-download"):
        job.prepare(request, print)


def test_conditions_that_are_not_finite_are_told(prepare, music, monkeypatch):
    original = job.encode

    def spoil(handler, words, frames):
        encoded = original(handler, words, frames)
        encoded.encoder_hidden_states[0, 0] = float("nan")
        return encoded

    monkeypatch.setattr(job, "encode", spoil)
    result = prepare(music)
    assert len(result.done.failed) == 3 and "NaN" in result.done.failed[0][1]
    assert not list(result.folder.glob("*.pt"))
