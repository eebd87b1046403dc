"""Decoding, WAV files, the table, and the command that makes clips of a saved adapter."""

from __future__ import annotations

import json
import wave
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from preview_parts import ABOUT, HOP, NAMES, filled, write_tiny_vae
from safetensors.torch import load_file

from sidestep_plugin import Refusal
from sidestep_plugin.cli import cli
from sidestep_plugin.engine.shapes import sampler_style
from sidestep_plugin.previews.clip_files import playable, write_wav
from sidestep_plugin.previews.conditions import PreviewSettings
from sidestep_plugin.previews.decoding import decode, load_vae, rate_of
from sidestep_plugin.previews.making import open_table, write_row
from sidestep_plugin.previews.table import Row, Table, clip_names, read_table


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    pytest.importorskip("diffusers", reason="decoding needs diffusers")
    return load_vae(write_tiny_vae(tmp_path_factory.mktemp("vae")), torch.device("cpu"))


def test_decoding_in_windows_is_decoding_at_once(vae):
    latents = torch.randn(1, 30, 64, generator=torch.Generator().manual_seed(1))
    before = torch.get_rng_state()
    whole = decode(vae, latents)
    assert whole.shape == (2, 30 * HOP) and rate_of(vae) == 48000
    torch.testing.assert_close(decode(vae, latents, window=8, overlap=8), whole)
    assert not torch.allclose(decode(vae, latents, window=8, overlap=0), whole, atol=1e-3), "the overlap is needed"
    assert torch.equal(before, torch.get_rng_state())


def test_a_wav_file_is_what_was_put_in(tmp_path):
    samples = torch.tensor([[0.0, 0.5, -0.5, 1.0], [1.0, -1.0, 0.25, 0.0]])
    write_wav(tmp_path / "a.wav", samples, 48000)
    with wave.open(str(tmp_path / "a.wav")) as written:
        assert (written.getframerate(), written.getnchannels(), written.getsampwidth()) == (48000, 2, 2)
        values = torch.frombuffer(bytearray(written.readframes(4)), dtype=torch.int16).reshape(4, 2).t()
    torch.testing.assert_close(values / 32767.0, samples, atol=2e-5, rtol=0.0)


def test_what_is_too_loud_is_turned_down_as_a_whole():
    loud = torch.tensor([[0.5, -2.0], [1.0, 0.0]])
    assert torch.equal(playable(loud), loud / 2.0)
    assert torch.equal(playable(loud / 4.0), loud / 4.0)


def test_a_table_is_read_as_it_was_written(tmp_path):
    table = filled(tmp_path)
    assert read_table(tmp_path) == table
    assert [row.label for row in table.rows] == ["base model", "epoch 1", "epoch 2", "epoch 10"]
    assert all((tmp_path / clip).is_file() for row in table.rows for clip in row.clips)


def test_files_stay_in_their_folder():
    names = clip_names("epoch 1", NAMES, ".wav")
    assert names == ["epoch_1/01_plain.wav", "epoch_1/02_a_quoted_song_mlaut.wav", "epoch_1/03_outside.wav"]


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        '{"rows": 1}',
        json.dumps({**ABOUT, "rows": [{"label": "x", "epoch": 1, "loss": 1, "clips": ["../a"] * 3}]}),
        json.dumps({**ABOUT, "rows": [{"label": "x", "epoch": "1", "loss": 1, "clips": ["a.wav"] * 3}]}),
        json.dumps({**ABOUT, "rows": [{"label": "x", "epoch": 1, "loss": "1", "clips": ["a.wav"] * 3}]}),
        json.dumps({**ABOUT, "rows": [{"label": "x", "epoch": 1, "loss": 1, "clips": ["a.wav"]}]}),
        json.dumps({**ABOUT, "rows": [], "songs": [{"name": "x", "seconds": "long"}]}),
        json.dumps({**ABOUT, "rows": [], "settings": {"shift": 1.0}}),
        json.dumps({**ABOUT, "rows": [], "settings": {**ABOUT["settings"], "guidance": None}}),
    ],
)
def test_a_table_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "previews.json").write_text(content, encoding="utf-8")
    with pytest.raises(Refusal, match="Delete the folder"):
        read_table(tmp_path)


def test_other_settings_begin_another_table(tmp_path):
    songs = [SimpleNamespace(name="plain", seconds=0.2, prompt="")]
    settings = PreviewSettings(1.0, 50, 7.0, 42, 20.0)
    table, aside = open_table(tmp_path / "previews", "m", songs, settings, goes_on=True)
    (tmp_path / "previews").mkdir()
    table.put(Row("epoch 1", 1, None, ["epoch_1/01_plain.wav"]))
    table.write(tmp_path / "previews")
    assert aside is None and open_table(tmp_path / "previews", "m", songs, settings, goes_on=True)[0].rows
    other = PreviewSettings(1.0, 8, 7.0, 42, 20.0)
    table, aside = open_table(tmp_path / "previews", "m", songs, other, goes_on=True)
    assert not table.rows and aside == tmp_path / "previews-1" and (aside / "previews.json").is_file()


def test_a_loss_that_is_no_number_is_unknown(tmp_path):
    """JSON has no NaN, and no page should show one."""
    table = Table({**ABOUT, "songs": ABOUT["songs"][:1]})
    write_row(tmp_path, table, "epoch 1", 1, float("nan"), [torch.zeros(1, 5, 64)])
    text = (tmp_path / "previews.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=pytest.fail)["rows"][0]["loss"] is None
    (tmp_path / "previews.json").write_text(text.replace('"loss": null', '"loss": NaN'), encoding="utf-8")
    assert read_table(tmp_path).rows[0].loss is None
    assert read_table(tmp_path).as_report()["rows"][0]["loss"] is None


# -- acestep-train preview -------------------------------------------------------------------------------------------


def preview(checkout, *line):
    more = ["--acestep-root", str(checkout.root), "--checkpoint-dir", str(checkout.checkpoints)]
    return CliRunner().invoke(cli, ["preview", *map(str, line), *more])


@pytest.fixture
def heard(train):
    def make(kind, **settings):
        options = {"preview_every": 2, "num_inference_steps": 3, "preview_songs": "1"}
        return train("base", kind, options=options, **settings).output

    return make


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_a_saved_adapter_gives_the_clip_of_its_epoch(heard, checkout, trainer, kind):
    """What the training generated with the adapter in memory, and what the file gives."""
    if sampler_style(trainer.sample_discrete_timestep) == "device and dtype":
        pytest.skip("this version of ACE-Step trains in bf16 on a CPU, where a saved adapter is heard in fp32")
    output = heard(kind)
    made = load_file(output / "previews" / "epoch_2" / "01_song_04.safetensors")["latents"]
    base = load_file(output / "previews" / "base_model" / "01_song_04.safetensors")["latents"]
    done = preview(checkout, output / "final", "--dataset-dir", checkout.tensors, "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert "Clips, as latents that nobody can hear yet: " in done.output and "Listen" not in done.output
    again = load_file(output / "previews" / "final" / "01_song_04.safetensors")["latents"]
    torch.testing.assert_close(again, made, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(again, base, atol=1e-2)
    assert "Generating 1 song: 3 steps, shift 1, CFG 7, seed 42" in done.output
    assert [row.label for row in read_table(output / "previews").rows] == ["base model", "epoch 2", "final"]
    apart = preview(checkout, output, "--dataset-dir", checkout.tensors, "--seed", 1)
    assert apart.exit_code == 2 and "cannot be compared with these" in apart.output
    told = ["--dataset-dir", checkout.tensors, "--device", "cpu"]
    assert preview(checkout, output / "final", *told, "--strengths", "0.5,1").exit_code == 0
    labels = [row.label for row in read_table(output / "previews").rows]
    assert labels == ["base model", "epoch 2", "final x 0.5", "final"]
    half = load_file(output / "previews" / "final_x_0.5" / "01_song_04.safetensors")["latents"]
    assert not torch.allclose(half, again, atol=1e-2) and not torch.allclose(half, base, atol=1e-2)
    assert "final x 0.5" in (output / "index.html").read_text(encoding="utf-8")
    nothing = preview(checkout, output / "final")
    assert nothing.exit_code == 2 and "--dataset-dir DIR" in nothing.output


def test_latents_are_decoded_later(tmp_path, checkout, vae):
    table = Table({**ABOUT, "songs": ABOUT["songs"][:1]})
    write_row(tmp_path / "previews", table, "epoch 1", 1, 0.5, [torch.randn(1, 5, 64)])
    assert not read_table(tmp_path / "previews").as_report()["rows"][0]["decoded"]
    line = ["preview", str(tmp_path), "--device", "cpu", "--checkpoint-dir"]
    nowhere = CliRunner().invoke(cli, [*line, str(checkout.checkpoints)])
    assert nowhere.exit_code == 2 and "there is no VAE" in nowhere.output
    write_tiny_vae(tmp_path / "checkpoints" / "vae")
    # Whoever asks for another clip gets that, or is told why not.
    other = CliRunner().invoke(cli, [*line, str(tmp_path / "checkpoints"), "--prompt", "late night jazz"])
    assert other.exit_code == 2 and "Decoded" not in other.output, other.output
    done = CliRunner().invoke(cli, [*line, str(tmp_path / "checkpoints")])
    assert done.exit_code == 0 and "Decoded 1 clip." in done.output, done.output
    with wave.open(str(tmp_path / "previews" / "epoch_1" / "01_plain.wav")) as clip:
        assert (clip.getnframes(), clip.getframerate()) == (5 * HOP, 48000)
    assert not list((tmp_path / "previews").rglob("*.safetensors"))
    assert f"Listen: {tmp_path / 'index.html'}" in done.output
    assert 'src="previews/epoch_1/01_plain.wav"' in (tmp_path / "index.html").read_text(encoding="utf-8")
