"""How songs were made: as they say, as their tensors show, and which of them must not be trained on."""

import os
import shlex

import pytest
import torch
from song_files import a_song, save

from sidestep_plugin import Refusal
from sidestep_plugin.run import ModelFacts
from sidestep_plugin.songs.dataset import check_songs, inspect_dataset
from sidestep_plugin.songs.making import Making, making_of, renew_command, upstream_notice
from sidestep_plugin.songs.showing import look_through

MODEL = ModelFacts(name="acestep-v15-base", config={}, written={})
_ORDER = iter(range(10_000))


def song(rows=769, visible=150, own_audio=False, frames=10, **metadata):
    """A song with latents of its own, told by its metadata; 769 rows as upstream's preprocessing makes them."""
    target = torch.randn(frames, 64, generator=torch.Generator().manual_seed(next(_ORDER)))
    mask = torch.zeros(rows)
    mask[:visible] = 1
    front = target if own_audio else torch.full((frames, 64), 0.25)
    return a_song(
        target_latents=target,
        attention_mask=torch.ones(frames),
        encoder_hidden_states=torch.zeros(rows, 8),
        encoder_attention_mask=mask,
        context_latents=torch.cat([front, torch.ones(frames, 64)], dim=1),
        metadata=metadata,
    )


def generated(model="acestep-v15-base", rows=96, **record):
    return song(rows, rows, prepared={"form": "generated", "model": model, **record})


def lokr(**metadata):
    return song(own_audio=True, preprocess_mode="lokr", **metadata)


def checked(folder, facts=MODEL):
    dataset = inspect_dataset(folder)
    check_songs(dataset, facts)
    return dataset


# -- told by the song --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "form"),
    [
        (song(), "upstream"),
        (song(visible=769), "upstream"),
        (song(96, 96), "unknown"),
        (song(96, 50), "unknown"),
        (song(own_audio=True), "own audio"),
        (song(96, 96, own_audio=True, prepared={"form": "generated"}), "own audio"),
        (song(preprocess_mode="lokr"), "own audio"),
        (song(preprocess_mode="lora"), "upstream"),
        (song(96, 96, preprocess_mode="lokr", prepared={"form": "generated"}), "generated"),
        (song(prepared={"form": "upstream"}), "upstream"),
        (song(769, 769, prepared={"form": "generated"}), "generated"),
        (song(prepared={"form": "something new"}), "upstream"),
        (song(prepared="yes"), "upstream"),
        (a_song(metadata=None), "unknown"),
        (a_song(metadata=["a", "list"]), "unknown"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_how_a_song_was_made_is_told_by_itself_or_shown_by_its_tensors(made, form):
    assert making_of(made).form == form


def test_what_a_song_says_is_kept():
    made = making_of(generated(encoders="abc"))
    assert made == Making("generated", True, "acestep-v15-base", "abc", 96, 0)
    assert making_of(song()) == Making("upstream", False, "", "", 769, 619)


def test_songs_of_zeros_hold_nothing_of_themselves():
    assert making_of(a_song()).form == "unknown"


def test_one_frame_that_is_the_same_is_not_the_whole_song():
    made = song()
    made["context_latents"][0, :64] = made["target_latents"][0]
    assert making_of(made).form == "upstream"


# -- refused -----------------------------------------------------------------------------------------------------------


def test_songs_that_hold_their_own_audio_are_refused_by_name_with_the_command_that_mends_them(tmp_path):
    save(tmp_path, "a.pt", song())
    save(tmp_path, "b.pt", lokr())
    with pytest.raises(Refusal) as refused:
        checked(tmp_path)
    assert str(refused.value).startswith(f"b.pt in {tmp_path} was preprocessed in ACE-Step's LoKr mode: the decoder is")
    assert str(refused.value).endswith(renew_command(tmp_path, "acestep-v15-base"))


def test_of_many_songs_five_are_named_and_the_rest_counted(tmp_path):
    for number in range(8):
        save(tmp_path, f"{number}.pt", lokr())
    with pytest.raises(Refusal, match=r"0\.pt, 1\.pt, 2\.pt, 3\.pt, 4\.pt and 3 more in .* were preprocessed"):
        checked(tmp_path)


@pytest.mark.parametrize(
    "other", [song(), song(96, 96), song(prepared={"form": "upstream", "model": "acestep-v15-base"})]
)
def test_songs_of_two_kinds_are_refused_together_by_name(other, tmp_path):
    save(tmp_path, "new.pt", generated())
    save(tmp_path, "old.pt", other)
    with pytest.raises(Refusal, match=r"two kinds in .*as generated in new\.pt, and others in old\.pt\..*--renew"):
        checked(tmp_path)


def test_songs_of_another_model_are_refused_with_both_names(tmp_path):
    save(tmp_path, "a.pt", generated("acestep-v15-turbo"))
    with pytest.raises(
        Refusal, match=r"prepared with acestep-v15-turbo, and acestep-v15-base has another.*--model acestep-v15-base"
    ):
        checked(tmp_path)
    checked(tmp_path, ModelFacts(name="acestep-v15-turbo", config={}, written={}))


def test_songs_of_a_model_without_a_name_are_not_refused(tmp_path):
    checked(save(tmp_path, "a.pt", generated("acestep-v15-turbo")), ModelFacts(name="", config={}, written={}))


def test_songs_of_several_models_are_refused_by_name(tmp_path):
    save(tmp_path, "a.pt", generated("acestep-v15-turbo"))
    save(tmp_path, "b.pt", generated())
    with pytest.raises(Refusal, match=r"different models: acestep-v15-turbo \(a\.pt\), acestep-v15-base \(b\.pt\)"):
        checked(tmp_path)


def test_songs_of_two_versions_of_a_model_are_refused_by_name(tmp_path):
    save(tmp_path, "a.pt", generated(encoders="1"))
    save(tmp_path, "b.pt", generated(encoders="2"))
    with pytest.raises(Refusal, match=r"two versions of acestep-v15-base: a\.pt and b\.pt"):
        checked(tmp_path)


@pytest.mark.parametrize(
    "made", [generated, song, lambda: song(96, 96)], ids=["as generated", "ACE-Step's way", "unknown"]
)
def test_songs_of_one_kind_are_trained_on(made, tmp_path):
    for name in ("a.pt", "b.pt"):
        save(tmp_path, name, made())
    assert len(checked(tmp_path).makings) == 2


# -- told --------------------------------------------------------------------------------------------------------------


def test_songs_encoded_ace_steps_way_are_told_in_one_line(tmp_path):
    save(tmp_path, "a.pt", song())
    save(tmp_path, "b.pt", song())
    line = upstream_notice(tmp_path, checked(tmp_path).makings, "acestep-v15-base")
    assert line is not None and line.startswith("2 songs encoded ACE-Step's way") and "\n" not in line
    assert line.endswith(renew_command(tmp_path, "acestep-v15-base"))
    assert upstream_notice(tmp_path, [making_of(generated()), making_of(song(96, 96))], "base") is None


@pytest.mark.skipif(os.name == "nt", reason="a shell of POSIX")
def test_the_command_can_be_pasted(tmp_path):
    folder = tmp_path / "it's my $music"
    words = shlex.split(renew_command(folder, "base"))
    assert words[:4] == ["acestep-train", "prepare", "--renew", str(folder)]
    assert words[4:] == ["--model", "base", "--output", f"{folder}-renewed"]


# -- shown -------------------------------------------------------------------------------------------------------------

GOOD = {
    "caption": "smoky jazz",
    "lyrics": "[Verse]\nla la",
    "duration": 100,
    "bpm": 120,
    "keyscale": "A minor",
    "timesignature": "4",
    "language": "en",
    "is_instrumental": False,
}


def wrong_with(folder, **changed):
    metadata = {key: value for key, value in {**GOOD, **changed}.items() if value is not None}
    save(folder, "a.pt", song(frames=2500, **metadata))
    return list(look_through(folder).reasons())


def test_a_good_song_has_nothing_wrong(tmp_path):
    assert wrong_with(tmp_path) == []


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"duration": 0}, 'the model is told "duration: 0 seconds"'),
        ({"duration": None}, "does not say its duration"),
        ({"duration": 300}, 'the model is told "duration: 300 seconds", and 100.0 seconds are there'),
        ({"language": None}, "does not say its language"),
        ({"language": "unknown"}, "has lyrics of an unknown language"),
        ({"language": "english"}, 'not in the model\'s words: language: "english" becomes "en"'),
        ({"keyscale": "Am"}, 'not in the model\'s words: keyscale: "Am" becomes "A minor"'),
        ({"keyscale": "D dorian"}, 'keyscale: the model does not know "D dorian"; it knows keys such as "F# minor"'),
        ({"caption": None}, "has no caption"),
        ({"caption": "a song", "filename": "a_song.wav"}, "has no caption of its own, but the file's name"),
        ({"lyrics": "la la " * 1000, "caption": "x"}, "lyrics of 5999 letters: their end is cut off, after 512 tokens"),
        ({"prepared": {"form": "generated", "lyrics_cut": 12}}, "12 tokens of the lyrics cut off, after 2048"),
        ({"prepared": {"form": "upstream", "lyrics_cut": 1}}, "1 token of the lyrics cut off, after 512"),
        ({"prepared": {"form": "generated", "caption_cut": 3}}, "3 tokens of the caption cut off, after 256"),
    ],
)
def test_what_looks_wrong_with_a_song_is_said(changed, says, tmp_path):
    assert says in wrong_with(tmp_path, **changed)


def test_the_files_name_with_a_trigger_word_is_no_caption_of_its_own(tmp_path):
    (tmp_path / "manifest.json").write_text(
        '{"metadata": {"custom_tag": "trg"}, "samples": ["a.pt"]}', encoding="utf-8"
    )
    says = "has no caption of its own, but the file's name"
    assert wrong_with(tmp_path, caption="trg, my song", filename="my_song.wav") == [says]
    assert wrong_with(tmp_path, caption="trg", filename="my_song.wav") == []


def test_songs_that_say_their_model_are_refused_by_it_before_a_file_beside_them_is_asked(tmp_path):
    save(tmp_path, "a.pt", generated("acestep-v15-turbo"))
    (tmp_path / "preprocess_meta.json").write_text('{"model_variant": "acestep-v15-turbo"}', encoding="utf-8")
    with pytest.raises(Refusal, match="were prepared with acestep-v15-turbo"):
        checked(tmp_path)
    save(tmp_path, "a.pt", song())
    with pytest.raises(Refusal, match=r"preprocessed for acestep-v15-turbo \(preprocess_meta\.json\).*prepare --renew"):
        checked(tmp_path)


def test_an_instrumental_needs_no_language(tmp_path):
    assert wrong_with(tmp_path, lyrics="[Instrumental]", language=None, is_instrumental=True) == []


def test_values_that_are_not_finite_own_audio_and_no_metadata_are_said(tmp_path):
    made = lokr(**{**GOOD, "duration": 0.4})
    made["encoder_hidden_states"][3] = float("nan")
    save(tmp_path, "a.pt", made)
    save(tmp_path, "b.pt", a_song(metadata=None))
    found = look_through(tmp_path)
    assert [song.wrong for song in found.songs] == [
        (
            "LoKr mode: the decoder is given the audio that it is to predict, and a training refuses it",
            "values that are not finite (NaN or infinity): encoder_hidden_states row 3",
        ),
        ("says nothing about itself: no metadata",),
    ]


def test_the_folder_says_what_its_songs_are_together(tmp_path):
    for name, made in (
        ("a.pt", song(**GOOD)),
        ("b.pt", song(513, 100, **GOOD)),
        ("c.pt", generated(**{"trigger": "trg"})),
    ):
        save(tmp_path, name, made)
    (tmp_path / "preprocess_meta.json").write_text('{"model_variant": "turbo"}', encoding="utf-8")
    found = look_through(tmp_path)
    notes = "\n".join(found.notes)
    assert "several kinds, which a training refuses: 1 ACE-Step's way, 1 not known, 1 as generated" in notes
    assert "padded to several lengths, 513, 769 rows" in notes and "preprocessed for turbo" in notes
    assert "prepared with acestep-v15-base" in notes and found.trigger == "trg"
    assert found.renew == renew_command(tmp_path, "acestep-v15-base")


def test_good_songs_as_generated_need_no_advice(tmp_path):
    save(
        tmp_path, "a.pt", song(96, 96, frames=2500, **GOOD, prepared={"form": "generated", "model": "acestep-v15-base"})
    )
    found = look_through(tmp_path)
    assert (found.renew, found.reasons(), found.seconds) == ("", {}, 100.0)


def test_a_manifest_that_names_what_is_not_there_is_said(tmp_path):
    save(tmp_path, "a.pt", song(**GOOD))
    (tmp_path / "manifest.json").write_text('{"samples": ["a.pt", "a.pt", "gone.pt"]}', encoding="utf-8")
    notes = look_through(tmp_path).notes
    assert "manifest.json names gone.pt, which is not there" in notes
    assert "a.pt is named 2 times in manifest.json" in notes
