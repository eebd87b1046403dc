"""The app's own preprocessing: upstream's bytes without the variable, the conditions of a generation with it."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch
from preparing.parts import handed_to_the_decoder

from sidestep_plugin import attach
from sidestep_plugin.engine.wrappers.preprocessing import CONDITIONS


class Log:
    def __init__(self):
        self.lines = []

    def note(self, line):
        self.lines.append(line)

    info = warning = error = note


@pytest.fixture
def log(monkeypatch):
    log = Log()
    monkeypatch.setattr("sidestep_plugin.engine.wrappers.preprocessing.log_of", lambda _: log)
    return log


def attached(trainer):
    return attach(trainer, announce=print)


@pytest.fixture
def builder(music, monkeypatch, trainer):
    """A dataset of two songs in the app, with names that are not random."""
    module = import_module("acestep.training.dataset_builder")
    sample_class = module.AudioSample
    samples = []
    for name, words in {
        "two": {"caption": "a quiet piano", "lyrics": "[Instrumental]", "duration": 3},
        "three": {
            "caption": "Chor, leise",
            "lyrics": "[Strophe]\nÜber den Flüssen",
            "language": "de",
            "is_instrumental": False,
            "bpm": 90,
            "keyscale": "Am",
            "timesignature": "4/4",
            "duration": 4,
        },
    }.items():
        file = music / f"{name}.wav"
        samples.append(sample_class(id=name, audio_path=str(file), filename=file.name, labeled=True, **words))

    def make():
        made = module.DatasetBuilder()
        made.samples = samples
        return made

    return make


def preprocessed(builder, handler, folder, **mode):
    torch.manual_seed(5)
    paths, message = builder().preprocess_to_tensors(handler, str(folder), **mode)
    return {path.rpartition("/")[2]: Path(path).read_bytes() for path in paths}, message


def test_without_the_variable_upstreams_files_are_its_own_byte_for_byte(
    builder, app, trainer, tmp_path, monkeypatch, log
):
    monkeypatch.delenv(CONDITIONS, raising=False)
    handler = app()
    theirs = preprocessed(builder, handler, tmp_path / "songs")
    with attached(trainer):
        ours = preprocessed(builder, handler, tmp_path / "songs")
    assert ours == theirs and len(ours[0]) == 2
    assert len(log.lines) == 1 and "SIDESTEP_CONDITIONS=generated" in log.lines[0] and "--renew" in log.lines[0]


def test_detached_the_name_is_the_original_again(builder, app, trainer, tmp_path, monkeypatch):
    owner = import_module("acestep.training.dataset_builder").DatasetBuilder
    before = owner.preprocess_to_tensors
    with attached(trainer):
        assert owner.preprocess_to_tensors is not before
    assert owner.preprocess_to_tensors is before


@pytest.mark.parametrize("mode", ["lora", "lokr"])
def test_with_the_variable_conditions_are_those_of_a_generation(
    builder, app, trainer, tmp_path, monkeypatch, log, mode
):
    monkeypatch.setenv(CONDITIONS, "generated")
    handler = app()
    asked = {} if mode == "lora" else {"preprocess_mode": mode}
    try:
        with attached(trainer):
            files, message = preprocessed(builder, handler, tmp_path / "songs", **asked)
    except TypeError:
        pytest.skip("this version has no modes")
    assert message.endswith("with conditions as generated") and len(files) == 2, message
    for name in files:
        song = torch.load(tmp_path / "songs" / name, weights_only=True)
        words = song["metadata"]["prepared"]["words"]
        states, context = handed_to_the_decoder(handler, words)
        assert torch.equal(song["encoder_hidden_states"], states)
        assert torch.equal(song["context_latents"], context[: len(song["target_latents"])])
        assert song["metadata"]["filename"] == name.replace(".pt", ".wav"), "its own metadata stays"
    words = torch.load(tmp_path / "songs" / "three.pt", weights_only=True)["metadata"]["prepared"]["words"]
    assert (words["keyscale"], words["timesignature"], words["bpm"]) == ("Am", "4/4", 90), "as typed in the app"
    assert words["lyrics"].startswith("[Strophe]") and words["language"] == "de"
    assert log.lines == []


@pytest.mark.parametrize("variable", ["", "generated"])
def test_songs_that_failed_are_told(builder, app, trainer, tmp_path, monkeypatch, log, music, variable):
    monkeypatch.setenv(CONDITIONS, variable)
    for name in ("two", "three"):
        (music / f"{name}.wav").write_bytes(b"no sound")
    with attached(trainer):
        files, message = preprocessed(builder, app(), tmp_path / "songs")
    assert not files
    assert any("2 songs of 2 could not be preprocessed" in line and "lists no songs now" in line for line in log.lines)
    assert message.startswith("❌") == bool(variable)


def test_a_song_that_keeps_upstreams_conditions_is_told(builder, app, trainer, tmp_path, monkeypatch, log):
    from sidestep_plugin.engine.wrappers import preprocessing

    def fail(handler, words, frames):
        raise RuntimeError("no memory")

    monkeypatch.setenv(CONDITIONS, "generated")
    monkeypatch.setattr(preprocessing, "encode", fail)
    with attached(trainer):
        files, message = preprocessed(builder, app(), tmp_path / "songs")
    assert len(files) == 2 and message.startswith("❌") and "no memory" in message
    assert "prepared" not in torch.load(tmp_path / "songs" / "two.pt", weights_only=True)["metadata"]


def test_another_value_is_told_and_changes_nothing(builder, app, trainer, tmp_path, monkeypatch, log):
    monkeypatch.setenv(CONDITIONS, "yes")
    with attached(trainer):
        preprocessed(builder, app(), tmp_path / "songs")
    assert any("SIDESTEP_CONDITIONS=yes is not known" in line for line in log.lines)
