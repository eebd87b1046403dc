"""Clips while it trains: what is generated, from what, and that the training does not notice."""

from __future__ import annotations

import json
import re
import wave
from types import SimpleNamespace

import pytest
import torch
from preview_parts import HOP, write_tiny_vae
from safetensors.torch import load_file

from sidestep_plugin import hookimpl
from sidestep_plugin.previews.table import Row, Table, read_table
from sidestep_plugin.registry import Registry
from sidestep_plugin.report.page import read_page

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


class Looking:
    """Notes the state of the training when a preview is over."""

    def __init__(self):
        self.seen = []

    @hookimpl(trylast=True)
    def acestep_between_epochs(self, run, epoch):
        decoder = run.model.decoder
        trained = [weight for weight in decoder.parameters() if weight.requires_grad]
        modes = {module.training for module in decoder.modules()}
        self.seen.append((epoch, modes, len(trained), any(weight.grad is not None for weight in trained)))


@pytest.mark.parametrize(
    "model, kind", [("base", "lora"), ("base", "lokr"), pytest.param("turbo", "lora", marks=pytest.mark.slow)]
)
def test_the_adapter_is_the_same_bit_for_bit(train, trainer, equal_bits, capsys, model, kind):
    """Dropout on (its default), condition dropout on (base), gradients waiting at the end of each epoch."""
    looking = Looking()
    without = train(model, kind, options={"num_inference_steps": 3}, **UNEVEN)
    heard = train(model, kind, options=ON, extra_plugins={"looking": looking}, **UNEVEN)
    assert equal_bits(without, heard)
    assert not (without.output / "previews").exists()
    assert [row["label"] for row in rows(heard.output)] == ["base model", "epoch 1", "epoch 2"]
    base, first, second = (clips(heard.output, label) for label in ("base_model", "epoch_1", "epoch_2"))
    assert len(base) == 2 and base.keys() == first.keys() == second.keys()
    for name in base:
        assert not torch.equal(base[name], first[name]) and not torch.equal(first[name], second[name])
    assert [epoch for epoch, *_ in looking.seen] == [0, 1, 2]
    assert all(modes == {True} for _, modes, *_ in looking.seen[1:])
    assert len({trained for _, _, trained, _ in looking.seen}) == 1 and looking.seen[0][2] > 0
    carried = "carries gradients over" in capsys.readouterr().out  # the first versions have no optimizer step there
    if getattr(trainer, "LIGHTNING_AVAILABLE", False) and not carried:
        assert not any(waiting for *_, waiting in looking.seen), "called before the last optimizer step"


@pytest.mark.slow
def test_under_autocast_with_frozen_weights_in_bf16(train, trainer, load, equal_bits, capsys, monkeypatch):
    """As on a GPU: weights of two types, and latents in fp32 between the steps."""
    for name in ("_precision", "_select_fabric_precision"):
        if hasattr(trainer, name):
            monkeypatch.setattr(trainer, name, lambda *_: "bf16-mixed")

    def run(**options):
        handler = load("base")
        handler.model.to(torch.bfloat16)
        return train("base", handler=handler, options={"num_inference_steps": 3} | options, max_epochs=1)

    without, heard = run(), run(preview_every=1)
    assert "Warning: no preview" not in capsys.readouterr().out
    assert equal_bits(without, heard)
    assert all(clip.dtype == torch.float32 for clip in clips(heard.output, "epoch_1").values())


def test_the_apps_settings_are_environment_variables():
    registry = Registry.load(["sidestep"])
    said, unknown = registry.options_in({"SIDESTEP_PREVIEW_EVERY": "5", "SIDESTEP_PREVIEW_SONGS": "a,b"})
    options = registry.resolve_options(said)
    assert (options["preview_every"], options["preview_songs"], unknown) == (5, "a,b", [])


@pytest.mark.slow
def test_drawing_in_a_preview_changes_nothing(train, equal_bits, monkeypatch):
    """Whatever the model's own generation code draws from the global generator."""
    from sidestep_plugin.previews import making

    original = making.generate

    def drawing(*args):
        torch.randn(3)
        return original(*args)

    without = train("base", options={"num_inference_steps": 3}, max_epochs=1)
    monkeypatch.setattr(making, "generate", drawing)
    assert equal_bits(without, train("base", options=ON, max_epochs=1))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_twins_are_equal_when_the_adapter_is_zero(train, kind):
    """A learning rate so small that nothing is learned: what the adapter adds is exactly nothing."""
    done = train("base", kind, options=ON, learning_rate=1e-45, weight_decay=0.0, max_epochs=1)
    base, trained = clips(done.output, "base_model"), clips(done.output, "epoch_1")
    assert len(base) == 2 and base.keys() == trained.keys()
    assert all(torch.equal(base[name], trained[name]) for name in base)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_a_resumed_run_without_a_table_makes_the_base_row_with_the_adapter_off(train, kind, tmp_path):
    """And it gives the adapter and the clips of the whole run; every second epoch is heard, and the last one."""
    every_second = ON | {"preview_every": 2}
    whole = train("base", kind, options=every_second, max_epochs=3, output_dir=str(tmp_path / "one"))
    (checkpoint,) = (tmp_path / "one" / "checkpoints").glob("epoch_2*")
    assert [row["label"] for row in rows(tmp_path / "one")] == ["base model", "epoch 2", "epoch 3"]
    report = json.loads((tmp_path / "one" / "training_report.json").read_text(encoding="utf-8"))
    known = [None, *(entry["loss"] for entry in report["loss_by_epoch"][1:])]
    assert [row["loss"] and round(row["loss"], 6) for row in rows(tmp_path / "one")] == known
    settings = {"max_epochs": 3, "resume_from": str(checkpoint), "output_dir": str(tmp_path / "two")}
    rest = train("base", kind, options=every_second, **settings)
    assert whole.losses and rest.losses, (whole.messages, rest.messages)
    final = [load_file(next((tmp_path / name / "final").rglob("*.safetensors"))) for name in ("one", "two")]
    assert final[0].keys() == final[1].keys()
    assert all(torch.equal(final[0][key], final[1][key]) for key in final[0])
    assert [row["label"] for row in rows(tmp_path / "two")] == ["base model", "epoch 3"]
    for label in ("base_model", "epoch_3"):
        one, two = (clips(tmp_path / name, label) for name in ("one", "two"))
        assert len(one) == 2 and all(torch.equal(one[name], two[name]) for name in one)
    # Once more, in the folder of the whole run: its table goes on.
    before = (tmp_path / "one/previews/base_model/01_song_02.safetensors").stat().st_mtime_ns
    train("base", kind, options=every_second, **settings | {"output_dir": str(tmp_path / "one")})
    assert [row["label"] for row in rows(tmp_path / "one")] == ["base model", "epoch 2", "epoch 3"]
    assert (tmp_path / "one/previews/base_model/01_song_02.safetensors").stat().st_mtime_ns == before
    assert not (tmp_path / "one" / "previews-1").exists()


@pytest.mark.slow
def test_clips_of_an_earlier_training_are_moved_aside(train, capsys, tmp_path):
    song = {"name": "other", "seconds": 1.0}
    earlier = Table(
        {"model_name": "m", "songs": [song], "settings": {}}, [Row("epoch 9", 9, 1.0, ["epoch_9/01_other.wav"])]
    )
    (tmp_path / "previews").mkdir()
    earlier.write(tmp_path / "previews")
    train("base", options=ON, max_epochs=1, output_dir=str(tmp_path))
    assert "clips of an earlier training were moved to" in capsys.readouterr().out
    assert [row["label"] for row in rows(tmp_path)] == ["base model", "epoch 1"]
    assert read_table(tmp_path / "previews-1") == earlier


@pytest.mark.slow
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
    assert re.search(r"Previews: 1 clips? in \d+\.\d s, in .*previews\n", out), out
    assert out.count("Previews: 1 clip") == 1 and "Note: " not in out
    assert logged in ([], [("preview/song_03", (1, 10 * HOP), epoch, 48000) for epoch in (0, 1)])
    assert logged or not getattr(trainer, "LIGHTNING_AVAILABLE", False)


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_preview_that_fails_warns_once_and_the_training_goes_on(train, equal_bits, capsys, monkeypatch):
    from sidestep_plugin.previews import making

    without = train("base", options={"num_inference_steps": 3}, max_epochs=1)
    monkeypatch.setattr(making, "generate", broken)
    done = train("base", options=ON, max_epochs=1)
    assert equal_bits(without, done)
    out = capsys.readouterr().out
    assert out.count("Warning: no preview after epoch 0: CUDA out of memory. The training goes on") == 1
    assert out.count("Clips of any saved adapter: ") == 1


@pytest.mark.parametrize("clips", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_training_that_is_stopped_makes_no_more_clips(train, monkeypatch, capsys, clips):
    """Before its first step and after an epoch: two songs are heard each time."""
    from sidestep_plugin.engine.services import Services
    from sidestep_plugin.previews import making

    original, made = making.generate, []

    def stopping(*args):
        made.append(1)
        return original(*args)

    monkeypatch.setattr(making, "generate", stopping)
    monkeypatch.setattr(Services, "stopping", property(lambda _: len(made) >= clips))
    done = train("base", options=ON, max_epochs=3)
    assert len(made) == clips and "Warning" not in capsys.readouterr().out
    assert not (done.output / "previews").exists() if clips < 2 else [row["epoch"] for row in rows(done.output)] == [0]


@pytest.mark.slow
def test_a_vae_that_fails_leaves_latents(train, vae_there, capsys, monkeypatch):
    from sidestep_plugin.previews import making

    monkeypatch.setattr(making, "decode", broken)
    done = train("base", options=ON | {"preview_songs": "1"}, max_epochs=1)
    assert capsys.readouterr().out.count("could not be decoded (CUDA out of memory) and are saved as latents") == 1
    assert all(clip.endswith(".safetensors") for row in rows(done.output) for clip in row["clips"])


def test_a_folder_that_cannot_be_written_is_a_warning(train, capsys, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "previews").write_text("in the way", encoding="utf-8")
    done = train("base", options=ON, max_epochs=1, output_dir=str(tmp_path / "out"))
    assert capsys.readouterr().out.count("Warning: no preview after epoch 0") == 1
    assert len(done.losses) == 3 and "complete" in done.messages[-1]


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


@pytest.mark.parametrize(
    "options", [{"preview_songs": "3"}, {"preview_seconds": 5.0}, {"preview_cfg": 3.0}, {"preview_seed": 1}]
)
def test_an_option_about_previews_without_previews_is_refused(train, options):
    done = train("base", options=options)
    (name,) = options
    assert f"--{name.replace('_', '-')} says how to make previews, and none are made." in done.messages[-1]
    assert not done.losses


def test_defaults_from_an_earlier_settings_file_are_no_mistake(train):
    assert train(
        "base", max_epochs=1, options={"preview_songs": "2", "preview_seconds": 20.0, "preview_seed": 42}
    ).losses


# -- what is on the page -------------------------------------------------------------------------------------------


ONE = ON | {"preview_songs": "1", "preview_seconds": 0.4}


@pytest.mark.slow
def test_a_new_training_moves_the_clips_of_the_one_before_aside_even_without_previews(train, capsys, tmp_path):
    train("base", options=ONE, max_epochs=1, output_dir=str(tmp_path))
    capsys.readouterr()
    train("base", max_epochs=1, output_dir=str(tmp_path))
    assert capsys.readouterr().out.count("clips of an earlier training were moved to") == 1
    assert not (tmp_path / "previews").exists()
    assert [row.label for row in read_table(tmp_path / "previews-1").rows] == ["base model", "epoch 1"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [ONE | {"preview_every": 2}, {"num_inference_steps": 3}])
def test_an_abandoned_branch_leaves_the_page(train, capsys, tmp_path, options):
    """Resuming from an earlier checkpoint: what was made after it belongs to another adapter."""
    settings = {"batch_size": 6, "output_dir": str(tmp_path)}
    train("base", options=ONE, max_epochs=3, **settings)
    old = clips(tmp_path, "epoch_3")
    table = read_table(tmp_path / "previews")
    table.put(Row("final", None, None, table.rows[-1].clips))
    table.write(tmp_path / "previews")
    (checkpoint,) = (tmp_path / "checkpoints").glob("epoch_1*")
    capsys.readouterr()
    train("base", options=options, max_epochs=2, learning_rate=0.05, resume_from=str(checkpoint), **settings)
    assert capsys.readouterr().out.count("clips of epochs after the checkpoint") == 1
    kept = ["base model", "epoch 1"] + ["epoch 2"] * ("preview_every" in options)
    assert [row["label"] for row in rows(tmp_path)] == kept
    assert [row["label"] for row in read_page(tmp_path / "index.html")["report"]["previews"]["rows"]] == kept
    page = (tmp_path / "index.html").read_text(encoding="utf-8").split("<h2>Listen</h2>")[1].split("<h2>")[0]
    assert "epoch 1" in page and "epoch 3" not in page and "final" not in page
    aside = tmp_path / "previews" / "abandoned-1"
    assert [row.label for row in read_table(aside).rows] == ["epoch 2", "epoch 3", "final"]
    moved = load_file(aside / "epoch_3" / f"{next(iter(old))}.safetensors")["latents"]
    assert torch.equal(moved, next(iter(old.values()))) and not (tmp_path / "previews" / "epoch_3").exists()


@pytest.mark.slow
def test_a_row_that_another_program_adds_meanwhile_stays(train, tmp_path):
    """``acestep-train preview`` of a checkpoint, while the training goes on."""

    class Adding:
        @hookimpl
        def acestep_epoch_finished(self, epoch):
            if epoch == 2:
                table = read_table(tmp_path / "previews")
                table.put(Row("best", None, None, table.rows[0].clips))
                table.write(tmp_path / "previews")

    train("base", options=ONE, batch_size=6, output_dir=str(tmp_path), extra_plugins={"adding": Adding()})
    assert [row["label"] for row in rows(tmp_path)] == ["base model", "epoch 1", "epoch 2", "best"]


@pytest.mark.slow
def test_the_last_epoch_is_heard_when_patience_ends_the_training(train):
    options = ONE | {"preview_every": 100, "validate": 1, "validate_every": 1, "patience": 1}
    done = train("base", options=options, max_epochs=6, batch_size=6, learning_rate=0.0)
    assert [row["label"] for row in rows(done.output)] == ["base model", "epoch 2"]


def test_a_damaged_table_is_a_warning(train, capsys, tmp_path):
    (tmp_path / "previews").mkdir()
    (tmp_path / "previews" / "previews.json").write_text("{", encoding="utf-8")
    done = train("base", max_epochs=1, output_dir=str(tmp_path))
    out = capsys.readouterr().out
    assert "Warning: the clips in" in out and "Delete the folder" in out and "complete" in done.messages[-1]
