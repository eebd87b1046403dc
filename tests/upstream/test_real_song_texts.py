"""Our readers against ACE-Step's own: its words, its choice of songs, its prompts, its samples.

pytest --acestep-root DIR tests/upstream/test_real_song_texts.py
"""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from wav_files import write_wav

from sidestep_plugin.songs import vocabulary
from sidestep_plugin.songs.audio import AUDIO, read_audio
from sidestep_plugin.songs.song_text import POSITIONS, SongText, find_texts

pytestmark = pytest.mark.upstream


@pytest.fixture
def upstream(trainer, monkeypatch):
    """Import a module of the checkout; skip where this version has none of that name."""

    def import_module(name):
        try:
            return importlib.import_module(name)
        except ImportError as error:
            pytest.skip(f"this checkout has no {name} that can be imported ({error})")

    return import_module


def test_the_words_are_those_of_the_models_constants(upstream):
    constants = upstream("acestep.constants")
    assert set(constants.VALID_LANGUAGES) == vocabulary.LANGUAGES
    assert [str(beats) for beats in constants.VALID_TIME_SIGNATURES] == list(vocabulary.TIME_SIGNATURES)
    assert (constants.BPM_MIN, constants.BPM_MAX) == vocabulary.BPM_RANGE
    for key in constants.VALID_KEYSCALES:
        assert vocabulary.keyscale(key) == vocabulary.Word(key)
    for number in range(1, 13):
        assert {vocabulary.keyscale(f"{number}{side}").value for side in "AB"} <= constants.VALID_KEYSCALES


def test_every_kind_of_audio_that_upstream_scans_is_read(upstream):
    assert set(upstream("acestep.training.dataset_builder_modules.models").SUPPORTED_AUDIO_FORMATS) <= AUDIO


@pytest.mark.parametrize("position", POSITIONS)
def test_the_prompt_is_upstreams_own(position, upstream):
    sample_of = upstream("acestep.training.dataset_builder_modules.models").AudioSample
    for caption, genre in (("pop, bright", "dance"), ("", ""), ("pop", "")):
        theirs = sample_of(caption=caption, genre=genre, custom_tag="trg").get_training_prompt(position)
        assert SongText(caption, trigger="trg", position=POSITIONS[position]).prompt == theirs


@pytest.mark.parametrize("ratio", [0, 10, 33, 50, 100])
@pytest.mark.parametrize("count", [1, 7, 20])
def test_the_songs_told_by_their_genre_are_upstreams_own(count, ratio, upstream, tmp_path):
    module = upstream("acestep.training.dataset_builder_modules.models")
    chosen = upstream("acestep.training.dataset_builder_modules.preprocess_utils").select_genre_indices
    samples = [
        module.AudioSample(
            filename=f"{n}.wav", audio_path=f"{n}.wav", caption=f"c{n}", genre=f"g{n}", labeled=n % 3 != 1
        )
        for n in range(count)
    ]
    labeled = [sample for sample in samples if sample.labeled]
    expected = {labeled[number].filename for number in chosen(labeled, ratio)}
    about = module.DatasetMetadata(genre_ratio=ratio).to_dict()
    content = {"metadata": about, "samples": [sample.to_dict() for sample in samples]}
    (tmp_path / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    files = [tmp_path / sample.filename for sample in samples]
    found = find_texts(tmp_path, files).songs
    assert {file.name for file in files if found[file].use == "genre"} == expected


def test_sidecars_give_what_upstreams_scan_gives(upstream, tmp_path, monkeypatch):
    builder = upstream("acestep.training.dataset_builder").DatasetBuilder()
    safety = upstream("acestep.training.path_safety")
    monkeypatch.chdir(tmp_path)
    if hasattr(safety, "set_safe_root"):
        safety.set_safe_root(str(tmp_path))
    for name in ("a.wav", "b.wav", "c.wav", "d.wav"):
        write_wav(tmp_path / name, 1.0, rate=8000)
    texts = {
        "a.caption.txt": "jazz\n",
        "a.lyrics.txt": "[Verse]\nla",
        "b.caption.txt": "typed",
        "b.json": '{"caption": "from json", "bpm": 90, "keyscale": "C major", "timesignature": "4", "language": "de"}',
        "b.txt": "[Verse]\nplain lyrics\nla",
        "c.json": '{"bpm": 70, "language": "en"}',
        "meta.csv": "File,BPM,Key,Caption\nb.wav,100,G major,from csv\nc.wav,,A minor,\n",
    }
    for name, content in texts.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    theirs, status = builder.scan_directory(str(tmp_path))
    if not theirs:
        pytest.skip(f"this checkout does not scan here: {status}")
    found = find_texts(tmp_path, [tmp_path / name for name in ("a.wav", "b.wav", "c.wav", "d.wav")]).songs
    for sample in theirs:
        ours = found[tmp_path / sample.filename]
        assert (ours.lyrics, ours.keyscale, ours.timesignature) == (
            sample.lyrics,
            sample.keyscale,
            sample.timesignature,
        )
        assert ours.bpm == sample.bpm and ours.caption == (sample.caption or sample.filename[0])
        assert ours.language == ("unknown" if ours.instrumental else sample.language)


@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize(("rate", "width"), [(48_000, 2), (44_100, 2), (96_000, 3), (8000, 2)])
def test_the_samples_are_upstreams_own_bit_for_bit(rate, width, channels, upstream, tmp_path):
    pytest.importorskip("soundfile")
    load = upstream("acestep.training.dataset_builder_modules.preprocess_audio").load_audio_stereo
    file = write_wav(tmp_path / "a.wav", 0.5, rate=rate, width=width, channels=channels)
    theirs, _ = load(str(file), 48_000, 240.0)
    assert torch.equal(read_audio(file).samples, theirs)
