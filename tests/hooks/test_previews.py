"""Clips while it trains: what is generated, from what, and that the training does not notice."""

from __future__ import annotations

import json
import re
import wave
from types import SimpleNamespace

import pytest
import torch
from preview_parts import HOP, moved_a_little, write_tiny_vae
from safetensors.torch import load_file

from sidestep_plugin import hookimpl

ON = {"preview_every": 1, "num_inference_steps": 3}
UNEVEN = {"batch_size": 1, "gradient_accumulation_steps": 4}  # 6 songs: a rest is left at the end of an epoch


def clips(output, label):
    folder = output / "previews" / label
    return {file.stem: load_file(file)["latents"] for file in sorted(folder.glob("*.safetensors"))}


def rows(output):
    return json.loads((output / "previews" / "previews.json").read_text(encoding="utf-8"))["rows"]


@pytest.fixture
def vae_there(tmp_path, monkeypatch):
    pytest.importorskip("diffusers", reason="decoding needs diffusers")
    monkeypatch.setenv("ACESTEP_CHECKPOINTS_DIR", str(tmp_path / "checkpoints"))
    return write_tiny_vae(tmp_path / "checkpoints" / "vae")


@pytest.mark.parametrize("model, kind", [("base", "lora"), ("base", "lokr"), ("turbo", "lora")])
def test_the_adapter_is_the_same_bit_for_bit(train, equal_bits, model, kind):
    """Dropout on (its default), condition dropout on (base), gradients waiting at the end of each epoch."""
    without = train(model, kind, options={"num_inference_steps": 3}, **UNEVEN)
    heard = train(model, kind, options=ON, **UNEVEN)
    assert equal_bits(without, heard)
    assert [row["label"] for row in rows(heard.output)] == ["base model", "epoch 1", "epoch 2"]
    assert not (without.output / "previews").exists()


def test_without_restoring_the_random_state_it_would_not_be(train, equal_bits, monkeypatch):
    """The test above can fail: a preview that draws from the global generator is noticed."""
    from sidestep_plugin.previews import making, undisturbed

    original = making.generate

    def drawing(*args):
        torch.randn(3)
        return original(*args)

    without = train("base", options={"num_inference_steps": 3})
    monkeypatch.setattr(making, "generate", drawing)
    assert equal_bits(without, train("base", options=ON))
    monkeypatch.setattr(undisturbed, "set_random_states", lambda *_: None)
    assert not equal_bits(without, train("base", options=ON))


class Looking:
    """Notes the state of the training when a preview is over."""

    def __init__(self):
        self.seen = []

    @hookimpl(trylast=True)
    def acestep_between_epochs(self, run, epoch):
        decoder = run.model.decoder
        gradients = [weight.grad is not None for weight in decoder.parameters() if weight.requires_grad]
        self.seen.append((epoch, {module.training for module in decoder.modules()}, any(gradients), len(gradients)))


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_modes_switches_and_the_loop_are_as_they_were(train, trainer, kind):
    looking = Looking()
    done = train("base", kind, options=ON, extra_plugins={"looking": looking}, **UNEVEN)
    assert [epoch for epoch, *_ in looking.seen] == [0, 1, 2], done.messages
    assert all(modes == {True} for _, modes, *_ in looking.seen[1:])
    assert len({count for *_, count in looking.seen}) == 1 and looking.seen[0][-1] > 0
    if getattr(trainer, "LIGHTNING_AVAILABLE", False):
        assert not any(waiting for *_, waiting, _ in looking.seen), "called before the last optimizer step"


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_twins_are_equal_when_the_adapter_is_zero(train, kind):
    """A learning rate so small that nothing is learned: what the adapter adds is exactly nothing."""
    done = train("base", kind, options=ON, learning_rate=1e-45, weight_decay=0.0, max_epochs=1)
    base, trained = clips(done.output, "base_model"), clips(done.output, "epoch_1")
    assert len(base) == 2 and base.keys() == trained.keys()
    assert all(torch.equal(base[name], trained[name]) for name in base)


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_what_was_learned_is_heard_and_what_is_off_is_not(train, load, kind):
    done = train("base", kind, options=ON, max_epochs=1)
    base, trained = clips(done.output, "base_model"), clips(done.output, "epoch_1")
    assert all(not torch.equal(base[name], trained[name]) for name in base)


def test_a_resumed_run_goes_on_with_the_table(train, equal_bits, tmp_path):
    whole = train("base", options=ON, max_epochs=3, output_dir=str(tmp_path / "one"))
    (checkpoint,) = (tmp_path / "one" / "checkpoints").glob("epoch_2*")
    first = (tmp_path / "one" / "previews" / "base_model" / "01_song_02.safetensors").stat().st_mtime_ns
    settings = {"max_epochs": 3, "resume_from": str(checkpoint)}
    rest = train("base", options=ON, output_dir=str(tmp_path / "one"), **settings)
    silent = train("base", options={"num_inference_steps": 3}, output_dir=str(tmp_path / "two"), **settings)
    assert whole.losses and rest.losses, (whole.messages, rest.messages)
    final = [load_file(next((tmp_path / name / "final").rglob("*.safetensors"))) for name in ("one", "two")]
    assert all(torch.equal(final[0][key], final[1][key]) for key in final[0])
    assert [row["label"] for row in rows(tmp_path / "one")] == ["base model", "epoch 1", "epoch 2", "epoch 3"]
    assert (tmp_path / "one/previews/base_model/01_song_02.safetensors").stat().st_mtime_ns == first
    assert silent.messages and not (tmp_path / "two" / "previews").exists()


def test_a_resumed_run_without_a_table_makes_the_base_row_with_the_adapter_off(train, load, tmp_path):
    done = train("base", options=ON | {"preview_every": 3}, max_epochs=3, output_dir=str(tmp_path / "one"))
    (checkpoint,) = (tmp_path / "one" / "checkpoints").glob("epoch_2*")
    assert done.losses
    rest = train("base", options=ON, max_epochs=3, output_dir=str(tmp_path / "two"), resume_from=str(checkpoint))
    assert rest.losses
    one, two = (clips(tmp_path / name, "base_model") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    one, two = (clips(tmp_path / name, "epoch_3") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_clips_of_an_earlier_training_are_moved_aside(train, capsys, tmp_path):
    for _ in range(2):
        train("base", options=ON, max_epochs=1, output_dir=str(tmp_path))
    assert "clips of an earlier training were moved to" in capsys.readouterr().out
    assert rows(tmp_path) and (tmp_path / "previews-1" / "index.html").is_file()


def test_every_second_epoch_and_the_last_one(train):
    done = train("base", options=ON | {"preview_every": 2}, max_epochs=3)
    assert [row["label"] for row in rows(done.output)] == ["base model", "epoch 2", "epoch 3"]
    losses = json.loads((done.output / "training_report.json").read_text(encoding="utf-8"))["loss_by_epoch"]
    of_epochs = [None if row["loss"] is None else round(row["loss"], 6) for row in rows(done.output)]
    assert of_epochs == [None, losses[1]["loss"], losses[2]["loss"]]


def test_with_a_vae_there_are_wav_files_and_tensorboard_has_them(train, trainer, vae_there, capsys, monkeypatch):
    logged = []
    if getattr(trainer, "LIGHTNING_AVAILABLE", False):
        from torch.utils.tensorboard import SummaryWriter

        def add_audio(_, name, samples, step, sample_rate):
            logged.append((name, tuple(samples.shape), step, sample_rate))

        monkeypatch.setattr(SummaryWriter, "add_audio", add_audio)
    done = train("base", options=ON | {"preview_songs": "song_03", "preview_seconds": 0.4}, max_epochs=1)
    out = capsys.readouterr().out
    assert [row["clips"] for row in rows(done.output)] == [["base_model/01_song_03.wav"], ["epoch_1/01_song_03.wav"]]
    with wave.open(str(done.output / "previews" / "epoch_1" / "01_song_03.wav")) as clip:
        assert (clip.getframerate(), clip.getnchannels(), clip.getsampwidth()) == (48000, 2, 2)
        assert clip.getnframes() == 10 * HOP, "0.4 s are 10 frames"
        assert len(set(clip.readframes(1000))) > 2, "not silence"
    assert re.search(r"Previews: 1 clips? in \d+\.\d s: .*index\.html", out), out
    assert out.count("Previews: 1 clip") == 1 and "Note: " not in out
    assert logged in ([], [("preview/song_03", (1, 10 * HOP), epoch, 48000) for epoch in (0, 1)])
    assert logged or not getattr(trainer, "LIGHTNING_AVAILABLE", False)


def test_the_vae_of_the_app_is_used_where_it_is(train, load, vae_there):
    handler = load("base")

    class Vae(torch.nn.Module):
        config = SimpleNamespace(sampling_rate=100)

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def decode(self, latents):
            return SimpleNamespace(sample=self.weight * latents[:, :2].repeat_interleave(4, dim=-1) / 1000)

    handler = SimpleNamespace(**vars(handler), vae=Vae())
    done = train("base", options=ON | {"preview_songs": "1"}, max_epochs=1, handler=handler)
    with wave.open(str(done.output / "previews" / rows(done.output)[1]["clips"][0])) as clip:
        assert clip.getframerate() == 100
    assert handler.vae.weight.device.type == "cpu"


def broken(*_, **__):
    raise RuntimeError("CUDA out of memory")


def test_a_preview_that_fails_warns_once_and_the_training_goes_on(train, equal_bits, capsys, monkeypatch):
    from sidestep_plugin.previews import making

    without = train("base", options={"num_inference_steps": 3})
    monkeypatch.setattr(making, "generate", broken)
    done = train("base", options=ON)
    assert equal_bits(without, done)
    out = capsys.readouterr().out
    assert out.count("Warning: no preview after epoch 0: CUDA out of memory. The training goes on") == 1
    assert out.count("Warning") == 1


def test_a_vae_that_fails_leaves_latents(train, vae_there, capsys, monkeypatch):
    from sidestep_plugin.previews import making

    monkeypatch.setattr(making, "decode", broken)
    done = train("base", options=ON)
    assert capsys.readouterr().out.count("could not be decoded (CUDA out of memory) and are saved as latents") == 1
    assert all(clip.endswith(".safetensors") for row in rows(done.output) for clip in row["clips"])


def test_a_folder_that_cannot_be_written_is_a_warning(train, equal_bits, capsys, tmp_path):
    without = train("base", options={"num_inference_steps": 3})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "previews").write_text("in the way", encoding="utf-8")
    done = train("base", options=ON, output_dir=str(tmp_path / "out"))
    assert capsys.readouterr().out.count("Warning: no preview after epoch 0") == 1
    assert done.losses == without.losses


@pytest.mark.parametrize(
    "model, options, message",
    [
        ("base", {"preview_songs": "9"}, "--preview-songs 9: there are 6 songs. Expected 1 to 6, or names"),
        ("base", {"preview_songs": "song_02,no such"}, "no song is named 'no such'. Expected a number, or names"),
        ("turbo", {"preview_cfg": 4.0}, "--preview-cfg 4: turbo models are generated without guidance"),
    ],
)
def test_what_cannot_be_heard_is_refused_before_the_first_step(train, model, options, message):
    done = train(model, options=ON | options)
    assert message in done.messages[-1] and not done.losses


def test_a_model_without_silence_is_refused(train, load):
    handler = load("base")
    handler.model.config._name_or_path = "/nowhere/acestep-v15-base"
    done = train("base", options=ON, handler=handler)
    assert "has no silence_latent.pt. Download the model again" in done.messages[-1] and not done.losses


def test_a_vae_of_another_width_is_refused(train, tmp_path, monkeypatch):
    (tmp_path / "vae").mkdir()
    said = {"_class_name": "AutoencoderOobleck", "decoder_input_channels": 32}
    (tmp_path / "vae" / "config.json").write_text(json.dumps(said), encoding="utf-8")
    monkeypatch.setenv("ACESTEP_CHECKPOINTS_DIR", str(tmp_path))
    done = train("base", options=ON)
    assert "AutoencoderOobleck with 32 channels, expected ACE-Step's AutoencoderOobleck with 64" in done.messages[-1]
    assert not done.losses


def test_the_helper_makes_adapters_that_do_something():
    layer = torch.nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.zero_()
    assert moved_a_little(layer) == 1 and layer.weight.any()
