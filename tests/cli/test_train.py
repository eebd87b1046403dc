"""``acestep-train train``: the whole job through the command line, and what bad input gets."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import COMMAND, running
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sidestep_plugin.cli import cli


@pytest.fixture
def run(checkout, trainer, tmp_path, monkeypatch):
    """Run ``acestep-train`` in this process: ``run("--model", "base", ...)`` with sensible folders filled in."""
    monkeypatch.chdir(tmp_path)
    # It would change the log of the tests after this one.
    monkeypatch.setattr("sidestep_plugin.cli.quiet.quiet_upstream", lambda: None)

    def invoke(*arguments, plugin="sidestep", **folders):
        folders = {
            "acestep_root": checkout.root,
            "checkpoint_dir": checkout.checkpoints,
            "dataset_dir": checkout.tensors,
            "output_dir": tmp_path / "output",
        } | folders
        line = [f"--plugin={plugin or 'none'}"]
        for name, folder in folders.items():
            line += [f"--{name.replace('_', '-')}", str(folder)]
        return CliRunner().invoke(cli, [*line, "--device", "cpu", *map(str, arguments)], catch_exceptions=False)

    return invoke


QUICK = ("--epochs", "2", "--batch-size", "2", "--save-every", "1", "--rank", "4", "--alpha", "8")


def adapters_under(folder):
    return sorted(file.parent for file in folder.rglob("*.safetensors"))


# -- the whole job ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "lokr"])
@pytest.mark.parametrize(
    ("model", "variant", "shift", "steps", "law"),
    [
        ("base", "base", 1.0, 50, "continuous, maximum of two logit-normal draws, mu -0.4, sigma 1.0"),
        ("sft", "sft", 1.0, 50, "continuous, maximum of two logit-normal draws, mu -0.4, sigma 1.0"),
        ("turbo", "turbo", 3.0, 8, "discrete, uniform over 1, 0.955, 0.9, 0.833, 0.75, 0.643, 0.5, 0.3"),
        ("turbo-shift1", "turbo", 1.0, 8, "discrete, uniform over 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125"),
    ],
)
def test_the_whole_job(run, require_kind, tmp_path, kind, model, variant, shift, steps, law):
    require_kind(kind)
    result = run("--model", model, "--adapter-type", kind, *QUICK)
    assert result.exit_code == 0, result.output
    assert f"variant {variant} (config.json: is_turbo = {str(variant == 'turbo').lower()}" in result.output
    assert law in result.output
    guidance = "off" if variant == "turbo" else "on"
    assert f"Generate with acestep-v15-{model}: shift {shift}, {steps} steps, CFG {guidance}." in result.output
    assert ("Condition dropout: 15 %" in result.output) == (variant != "turbo")
    folders = adapters_under(tmp_path / "output")
    assert len(folders) == 3, "two checkpoints and the final adapter"
    for folder in folders:
        text = (folder / "training_config.json").read_text(encoding="utf-8")
        facts = json.loads(text)
        assert (facts["model_name"], facts["model_variant"]) == (f"acestep-v15-{model}", variant)
        assert (facts["shift"], facts["num_inference_steps"]) == (shift, steps)
        # The LoKr is full-matrix here, so LyCORIS replaces its alpha.
        assert (facts["adapter_type"], facts["rank"], facts["alpha"]) == (kind, 4, {"lora": 8, "lokr": 4}[kind])
        assert str(tmp_path) not in text and str(tmp_path.parent) not in text


def test_the_finished_lora_loads_with_peft(run, load, tmp_path):
    from peft import PeftModel

    assert run("--model", "base", "--learning-rate", "0.01", "--gradient-accumulation", 1, *QUICK).exit_code == 0
    loaded = PeftModel.from_pretrained(load("base").model.decoder, str(tmp_path / "output" / "final" / "adapter"))
    moved = [weight for name, weight in loaded.named_parameters() if "lora_B" in name]
    assert moved and all(weight.abs().sum() > 0 for weight in moved)


def test_songs_and_output_may_lie_anywhere(run, checkout, tmp_path_factory):
    songs = shutil.copytree(checkout.tensors, tmp_path_factory.mktemp("elsewhere") / "songs é ü")
    output = tmp_path_factory.mktemp("far away") / "new" / "output"
    result = run("--model", "base", *QUICK, dataset_dir=songs, output_dir=output)
    assert result.exit_code == 0, result.output
    assert (output / "final" / "adapter" / "training_config.json").is_file()


def test_without_a_plugin_it_trains_as_upstream(run, train, checkout, tmp_path):
    settings = ("--epochs", 2, "--batch-size", 2, "--rank", 4, "--alpha", 8, "--learning-rate", "0.01", "--seed", 7)
    result = run("--model", "base", "--gradient-accumulation", 1, *settings, plugin=None)
    assert result.exit_code == 0, result.output
    assert "Timesteps" not in result.output
    ours = load_file(tmp_path / "output" / "final" / "adapter" / "adapter_model.safetensors")
    upstreams = train("base", plugins=None).tensors
    assert ours.keys() == upstreams.keys() and all(ours[key].equal(upstreams[key]) for key in ours)
    assert not list((tmp_path / "output").rglob("training_config.json"))


def test_a_lokr_beside_an_earlier_lora_gets_its_own_description(run, require_kind, tmp_path):
    require_kind("lokr")
    assert run("--model", "base", *QUICK).exit_code == 0
    result = run("--model", "base", "--adapter-type", "lokr", "--overwrite", *QUICK)
    assert result.exit_code == 0, result.output
    final = tmp_path / "output" / "final"
    assert f"Adapter: {final}\n" in result.output
    for folder, kind in ((final / "adapter", "lora"), (final, "lokr")):
        assert json.loads((folder / "training_config.json").read_text(encoding="utf-8"))["adapter_type"] == kind


def test_a_loss_that_is_no_number_is_a_failed_training(run, trainer, monkeypatch):
    monkeypatch.setattr(trainer.F, "mse_loss", lambda a, b: (a * float("nan")).sum())
    result = run("--model", "base", *QUICK)
    # Upstream's own loop divides by zero on gradients that are not finite; the stand-in's goes on to the end.
    assert result.exit_code == 1, result.output
    assert re.search("is NaN or infinite|ACE-Step: Training failed", result.stderr), result.stderr


def test_a_failed_training_is_exit_code_1(run, trainer, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(trainer, "save_lora_weights", fail)
    monkeypatch.setattr(trainer, "save_training_checkpoint", fail, raising=False)
    result = run("--model", "base", *QUICK, plugin=None)
    assert result.exit_code == 1
    assert "Error:" in result.stderr and "the disk is full" in result.stderr and "Traceback" not in result.stderr


def test_metadata_options_are_only_metadata(run, tmp_path):
    assert run("--model", "base", "--shift", "2.5", "--num-inference-steps", "30", *QUICK).exit_code == 0
    facts = json.loads((tmp_path / "output/final/adapter/training_config.json").read_text(encoding="utf-8"))
    assert (facts["shift"], facts["num_inference_steps"]) == (2.5, 30)


def test_variant_settles_and_is_reported(run):
    result = run("--model", "base", "--variant", "turbo", *QUICK)
    assert result.exit_code == 0
    assert "Note: --variant turbo contradicts config.json: is_turbo = false" in result.output


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
@pytest.mark.parametrize("kind", ["lora", pytest.param("lokr", marks=pytest.mark.slow)])
def test_an_interrupted_training_saves_the_adapter(checkout, require_kind, tmp_path, kind):
    require_kind(kind)
    if checkout.real:
        pytest.skip("a process of its own imports the checkout's own environment; see the whole job above")
    line = [*COMMAND, "--plugin", "sidestep"]
    line += ["--model", "base", "--adapter-type", kind, "--epochs", "100000", "--batch-size", "2", "--device", "cpu"]
    line += ["--acestep-root", checkout.root, "--checkpoint-dir", checkout.checkpoints]
    line += ["--dataset-dir", checkout.tensors, "--output-dir", tmp_path / "output"]
    with running(line, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        for text in process.stdout:
            if "epoch 3/" in text:
                break
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "Stopping after this step" in output and "Adapter so far: " in output
    # The whole command that resumes it, as it can be pasted into the shell.
    (resuming,) = re.findall(r"^To resume:\n  acestep-train (.*)$", output, flags=re.MULTILINE)
    (steps,) = re.findall(r"^Interrupted after (\d+) of", output, flags=re.MULTILINE)
    resuming = resuming.replace("--epochs 100000", f"--epochs {int(steps) // 3 + 2}")
    done = subprocess.run([*COMMAND, *shlex.split(resuming)], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0 and "✅ Resumed" in done.stdout, done.stdout + done.stderr
    (folder,) = adapters_under(tmp_path / "output" / "interrupted")
    assert json.loads((folder / "training_config.json").read_text(encoding="utf-8"))["model_variant"] == "base"
    (weights,) = folder.glob("*.safetensors")
    with safe_open(weights, framework="pt") as file:
        assert list(file.keys())


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
def test_a_training_that_is_interrupted_before_its_first_step_ends_at_once(run, tmp_path, monkeypatch):
    """Without the rest of the base model's clips, and what --overwrite has set aside is back in its place."""
    from sidestep_plugin.previews import making

    assert run("--model", "base", "--save-every", "1", *QUICK).exit_code == 0
    checkpoints, page = list((tmp_path / "output/checkpoints").iterdir()), tmp_path / "output/index.html"
    before, made = page.read_bytes(), []

    def interrupted(*_):
        made.append(1)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(making, "generate", interrupted)
    result = run("--model", "base", "--preview-every", "1", "--overwrite", *QUICK)
    assert (result.exit_code, made) == (130, [1]), result.output
    assert result.stderr == "Interrupted before the first step; nothing was saved.\n"
    assert list((tmp_path / "output/checkpoints").iterdir()) == checkpoints and page.read_bytes() == before


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(run, tmp_path):
    """Run, and expect exit code 2, a message of at most two lines and nothing written."""

    def invoke(*arguments, says, **folders):
        before = set(tmp_path.rglob("*"))
        result = run(*arguments, **folders)
        assert result.exit_code == 2, result.output
        message = result.stderr.strip()
        assert re.search(says, message), message
        assert "Traceback" not in result.output
        assert len(message.splitlines()) <= 4  # click adds two lines on how to get help to errors of usage
        assert set(tmp_path.rglob("*")) == before, "something was written"

    return invoke


@pytest.fixture
def model_folder(checkout, tmp_path):
    """A copy of a model under another name, with changes to its config.json (None leaves a key out)."""

    def make(name, source="acestep-v15-base", **changes):
        folder = shutil.copytree(checkout.checkpoints / source, tmp_path / "models" / name)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | changes
        config = {key: value for key, value in config.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return folder

    return make


def test_no_acestep(refused, tmp_path):
    refused("--model", "base", says="No ACE-Step 1.5 found.*--acestep-root DIR", acestep_root=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("model", "warned"),
    [
        ("base", "at turbo's 8 timesteps and without condition dropout, not the way base was trained"),
        ("turbo-shift1", "at turbo's 8 timesteps, not the way turbo-shift1 was trained"),
        ("turbo", None),
    ],
)
def test_without_a_plugin_a_model_that_is_not_turbo_is_warned_about_before_it_is_loaded(run, model, warned):
    result = run("--model", model, *QUICK, plugin=None)
    assert result.exit_code == 0, result.output
    output = result.output.splitlines()
    lines = [number for number, line in enumerate(output) if line.startswith("Warning: without a plugin")]
    assert len(lines) == (warned is not None)
    if warned is not None:
        assert warned in result.output and "leave --plugin none out." in result.output
        assert output[lines[0] + 1].startswith("Loading ")


def test_unknown_plugin(refused):
    refused("--model", "base", plugin="nobody", says="No plugin 'nobody' is installed. Installed: .*sidestep")


@pytest.mark.parametrize("name", ["side-step", "Sidestep", "sidstep", "side_step"])
def test_a_plugin_of_almost_that_name(refused, name):
    refused("--model", "base", plugin=name, says=rf"No plugin '{name}' is installed\. Did you mean sidestep\?")


def test_missing_model_lists_what_is_there(refused):
    refused("--model", "bass", says="No model 'bass'.*acestep-v15-base, acestep-v15-sft, acestep-v15-turbo")
    refused("--model", "bass", says="No model 'bass'.*acestep-download --list")
    refused("--model", "xl-sft", says="No model 'xl-sft'.*acestep-download --model acestep-v15-xl-sft")


def test_missing_dataset(refused, tmp_path):
    refused("--model", "base", says="No dataset folder", dataset_dir=tmp_path / "nowhere")


def test_empty_dataset(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    refused("--model", "base", says="No songs in", dataset_dir=tmp_path / "empty")


def test_dataset_of_something_else(refused, tmp_path):
    (tmp_path / "songs").mkdir()
    (tmp_path / "songs" / "song.pt").write_bytes(b"not a tensor")
    refused("--model", "base", says=r"Not songs to train on.*song.pt", dataset_dir=tmp_path / "songs")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe{}", b"null"])
def test_unreadable_config(refused, model_folder, content):
    folder = model_folder("acestep-v15-base")
    (folder / "config.json").write_bytes(content)
    refused("--model", folder, says="config.json (is not JSON|holds a|is empty)")


def test_config_missing(refused, model_folder):
    folder = model_folder("acestep-v15-base")
    (folder / "config.json").unlink()
    refused("--model", folder, says="No config.json in")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="makes a named pipe")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "more.safetensors", "generation_config.json"])
def test_a_named_pipe_in_a_model_folder_is_not_waited_for(refused, model_folder, name):
    folder = model_folder("acestep-v15-base")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    refused("--model", folder, says=rf"{re.escape(name)}:?( it)? is a named pipe, not a file\. Copy the")


def test_a_dead_link_in_a_model_folder(refused, model_folder, tmp_path):
    if os.name == "nt":
        pytest.skip("makes a symbolic link")
    folder = model_folder("acestep-v15-base")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(tmp_path / "blobs" / "gone")
    refused("--model", folder, says=r"model\.safetensors is a link to .*gone, which is not there\. Copy")


def test_the_companion_files_of_macos_in_a_model_folder_are_skipped(run, model_folder):
    folder = model_folder("acestep-v15-base")
    for name in ("._model.safetensors", "._config.json"):
        (folder / name).write_bytes(b"\x00\x05\x16\x07")
    result = run("--model", folder, *QUICK)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("rank", [65, 10**6, 10**18])
def test_a_rank_beyond_the_width_of_the_model(refused, run, rank):
    refused("--model", "base", "--rank", rank, says=rf"--rank {rank} is higher than acestep-v15-base is wide \(64\)")


def test_undecidable_variant(refused, model_folder):
    folder = model_folder("my-model", is_turbo=None)
    refused("--model", folder, says="Cannot tell the variant of 'my-model'.*--variant")


def test_contradictory_variant(refused, model_folder):
    folder = model_folder("acestep-v15-turbo-mine", is_turbo=False)
    refused("--model", folder, says="is_turbo = false, but the folder name.*contradict.*--variant")


@pytest.mark.parametrize("change", [{"timestep_mu": None}, {"timestep_mu": "x"}, {"timestep_sigma": 0.0}])
def test_absurd_law(refused, model_folder, change):
    refused("--model", model_folder("acestep-v15-base", **change), says="timestep_(mu|sigma)")


@pytest.mark.parametrize("stored", [False, True], ids=["not in the class", "lost from the file"])
def test_no_null_condition(refused, model_folder, stored):
    folder = model_folder("acestep-v15-base")
    weights = load_file(folder / "model.safetensors")
    del weights["null_condition_emb"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if not stored:
        source = folder / "modeling_acestep_v15_miniature.py"
        text = source.read_text(encoding="utf-8")
        source.write_text(
            text + "\n\n_init = AceStepConditionGenerationModel.__init__\n\n\n"
            "def without(self, config):\n    _init(self, config)\n    del self.null_condition_emb\n\n\n"
            "AceStepConditionGenerationModel.__init__ = without\n",
            encoding="utf-8",
        )
    refused("--model", folder, says="no null_condition_emb.*--cfg-ratio 0")


def test_lost_decoder_weights(refused, model_folder):
    folder = model_folder("acestep-v15-base")
    weights = load_file(folder / "model.safetensors")
    del weights[next(key for key in weights if key.startswith("decoder."))]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused("--model", folder, says="lack 1 tensor of the decoder")


def test_songs_of_another_model(refused, checkout):
    refused("--model", "xl-base", says="width 64, acestep-v15-xl-base expects 48")
    refused("--model", "base", says="width 48, acestep-v15-base expects 64", dataset_dir=checkout.xl_tensors)


def test_quantized_by_config(refused, model_folder):
    folder = model_folder("acestep-v15-base", quantization_config={"quant_method": "torchao"})
    refused("--model", folder, says="is quantized.*bf16 or fp32")


def test_quantized_weights(refused, model_folder):
    import torch

    folder = model_folder("acestep-v15-base")
    weights = load_file(folder / "model.safetensors")
    key = next(key for key in weights if key.startswith("decoder."))
    weights[key] = weights[key].to(torch.int8)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused("--model", folder, says="is quantized.*is I8")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--cfg-ratio", "1.01"),
        ("--cfg-ratio", "-0.1"),
        ("--cfg-ratio", "nan"),
        ("--shift", "0"),
        ("--shift", "-1"),
        ("--shift", "inf"),
        ("--num-inference-steps", "0"),
        ("--num-inference-steps", "8.5"),
        ("--variant", "tturbo"),
        ("--epochs", "0"),
        ("--learning-rate", "nan"),
        ("--target-modules", " , "),
        ("--device", "gpu"),
    ],
)
def test_settings_out_of_range(refused, option, value):
    refused("--model", "base", option, value, says=re.escape(option) if option != "--device" else "not a device")


def test_a_plugins_option_without_the_plugin(refused):
    says = "--cfg-ratio.*sidestep, which takes no part. Leave --plugin none out"
    refused("--model", "base", "--cfg-ratio", "0.1", plugin=None, says=says)


def test_output_under_a_file(refused, tmp_path):
    (tmp_path / "file").touch()
    refused("--model", "base", says="Cannot write to.*Not a directory", output_dir=tmp_path / "file" / "output")


def test_cuda_without_cuda(refused):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    refused("--model", "base", "--device", "cuda", says="No cuda on this machine")


def test_a_setting_that_this_acestep_does_not_have(refused, require_kind):
    require_kind("lokr")
    refused("--model", "base", "--adapter-type", "lokr", "--dropout", "0.1", says="LoKRConfig has no such.*--dropout")


def test_lokr_without_lycoris(refused, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lycoris" else find(name, *a))
    refused("--model", "base", "--adapter-type", "lokr", says="pip install lycoris-lora")


def test_training_without_plugin_over_described_adapters(run, tmp_path):
    assert run("--model", "base", *QUICK).exit_code == 0
    result = run("--model", "base", *QUICK, plugin=None)
    assert result.exit_code == 2 and "Choose another --output-dir" in result.stderr


def test_an_empty_folder_name(refused):
    refused("--model", "base", says="folder's name is empty", output_dir="")


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="every name of a file is text there")
def test_an_output_folder_whose_name_is_not_utf8(refused, tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/music-\xff/output")
    refused("--model", "base", says=r"music-\\udcff/output is not UTF-8.*Choose another folder", output_dir=folder)


def test_a_name_that_is_too_long(refused):
    refused("--model", "x" * 300, says="File name too long")


def test_validation_that_would_not_happen(refused, require_kind):
    require_kind("lokr")
    refused(
        "--model",
        "base",
        "--adapter-type",
        "lokr",
        "--val-split",
        "0.5",
        says="never validate on them|no such setting: --val-split",
    )


@pytest.mark.skipif(os.name == "nt", reason="makes a symbolic link")
def test_songs_that_are_links_out_of_the_folder(refused, checkout, trainer, tmp_path):
    if not hasattr(trainer, "safe_path"):
        pytest.skip("this checkout has no path guard")
    (tmp_path / "songs").mkdir()
    (tmp_path / "songs" / "song.pt").symlink_to(next(checkout.tensors.glob("*.pt")))
    refused(
        "--model",
        "base",
        says=r"links to files outside of it: song\.pt .*Put the songs themselves there",
        dataset_dir=tmp_path / "songs",
    )


def test_songs_with_nan(refused, run, checkout, tmp_path):
    import torch

    songs = shutil.copytree(checkout.tensors, tmp_path / "songs")
    song = torch.load(songs / "song_02.pt", weights_only=True)
    song["encoder_hidden_states"][-1], song["encoder_attention_mask"][-1] = float("nan"), 0
    torch.save(song, songs / "song_02.pt")
    says = r"only in rows that the mask hides: song_02\.pt \(encoder_hidden_states row \d+\).*--mask-nan"
    refused("--model", "base", says=says, dataset_dir=songs)
    refused("--model", "base", says=says, dataset_dir=songs, plugin=None)
    assert "Loading" not in run("--model", "base", dataset_dir=songs).output, "the model is not loaded for that"
    result = run("--model", "base", "--mask-nan", *QUICK, dataset_dir=songs)
    assert result.exit_code == 0, result.output
    assert "NaN: set to zero in rows that the mask hides, in 1 of 6 songs (--mask-nan)" in result.output


def test_a_named_pipe_among_the_songs(refused, checkout, tmp_path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("makes a named pipe")
    songs = shutil.copytree(checkout.tensors, tmp_path / "songs")
    (songs / "manifest.json").unlink(missing_ok=True)
    os.mkfifo(songs / "song_09.pt")
    refused("--model", "base", says=r"song_09\.pt \(is a named pipe, not a file\)", dataset_dir=songs)


@pytest.mark.parametrize("plugin", ["sidestep", None])
def test_the_companion_files_of_macos_are_not_trained_on(run, checkout, tmp_path, plugin):
    songs = shutil.copytree(checkout.tensors, tmp_path / "songs")
    (songs / "manifest.json").unlink(missing_ok=True)
    for number in range(1, 7):
        (songs / f"._song_{number:02}.pt").write_bytes(b"\x00\x05\x16\x07")
    result = run("--model", "base", *QUICK, dataset_dir=songs, plugin=plugin)
    assert result.exit_code == 0, result.output
    assert "step 6/6" in result.output, "6 songs, 2 a batch, 2 epochs"


def test_songs_with_other_channels(refused, model_folder):
    refused("--model", model_folder("acestep-v15-base", in_channels=100), says="192 channels.*takes 100")


def test_a_folder_that_is_no_checkpoint(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(
        "--model",
        "base",
        "--resume-from",
        tmp_path / "empty",
        says="is not a checkpoint.*no training can be resumed from it",
    )
    refused("--model", "base", "--resume-from", tmp_path / "gone", says="No checkpoint folder")
    refused("--model", "base", "--resume-from", "latest", says="No checkpoint to resume from in .*Start without")


def test_songs_made_for_another_encoder(refused, checkout, tmp_path):
    songs = shutil.copytree(checkout.tensors, tmp_path / "songs")
    (songs / "preprocess_meta.json").write_text(json.dumps({"model_variant": "turbo"}), encoding="utf-8")
    refused("--model", "base", says="preprocessed for turbo.*another condition encoder", dataset_dir=songs)


def test_the_adapters_of_another_training_are_not_replaced_unasked(run, refused, tmp_path):
    assert run("--model", "base", *QUICK).exit_code == 0
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.safetensors")}
    refused(
        "--model", "base", *QUICK, says="already holds the adapters of a training .*--resume-from latest.*--overwrite"
    )
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.safetensors")} == before
    assert run("--model", "base", "--overwrite", "--seed", "8", *QUICK).exit_code == 0
    final = tmp_path / "output" / "final" / "adapter" / "adapter_model.safetensors"
    assert final.read_bytes() != before[final]


# -- going on --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_resume_from_latest(run, require_kind, tmp_path, kind):
    require_kind(kind)
    settings = ("--adapter-type", kind, *QUICK[2:])
    assert run("--model", "base", "--epochs", "4", *settings).exit_code == 0
    first = run("--model", "base", "--epochs", "2", *settings, output_dir=tmp_path / "again")
    assert first.exit_code == 0
    result = run(
        "--model", "base", "--epochs", "4", "--resume-from", "latest", *settings, output_dir=tmp_path / "again"
    )
    assert result.exit_code == 0, result.output
    assert re.search(r"Resuming from .*epoch_2.*: the adapter's weights, optimizer, learning rate", result.output)
    assert "Note: changed since the checkpoint: epochs (was 2, now 4)" in result.output
    assert re.search(
        r"Resumed: (\d+) of \1 tensors of the adapter, after epoch 2, 6 training steps done", result.output
    )
    assert "step 12/12, epoch 4/4" in result.output
    assert "step 3/12" not in result.output, "steps that were done are counted again"
    assert result.output.index("✅ Resumed: ") < result.output.index("step 9/12, epoch 3/4")


def test_resuming_with_another_rank_is_refused_before_training(run, tmp_path):
    assert run("--model", "base", *QUICK).exit_code == 0
    result = run("--model", "base", *QUICK[:-4], "--rank", "2", "--alpha", "16", "--resume-from", "latest")
    assert result.exit_code == 2
    assert "rank (was 4, now 2); alpha (was 8, now 16)" in result.stderr


# -- bad days --------------------------------------------------------------------------------------------------------


def failing(trainer, monkeypatch, error, step):
    """Let the computation of one training step fail."""
    calls = []
    compute = trainer.F.mse_loss

    def fails(*arguments, **more):
        calls.append(1)
        if len(calls) == step:
            raise error
        return compute(*arguments, **more)

    monkeypatch.setattr(trainer.F, "mse_loss", fails)


def test_a_training_that_runs_out_of_memory_is_saved_and_told_what_to_change(run, trainer, monkeypatch, tmp_path):
    import torch

    failing(trainer, monkeypatch, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), step=5)
    result = run("--model", "base", *QUICK)
    assert result.exit_code == 1, result.output
    assert "CUDA out of memory" in result.stderr
    assert re.search(r"Lower --batch-size \(now 2\).*--gradient-accumulation.*--rank \(now 4\)", result.stderr)
    assert "Saved as it was after 4 training steps" in result.output
    assert "--resume-from latest" in result.stderr
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_a_disk_that_is_full_for_a_checkpoint_does_not_end_the_training(
    run, trainer, require_kind, monkeypatch, tmp_path, kind
):
    require_kind(kind)
    attaching = sys.modules["sidestep_plugin.engine.wrappers.saving"]
    real, saves = attaching.published, []

    def full(stage, folder):
        saves.append(folder.name)
        if len(saves) == 1:
            raise OSError(28, "No space left on device")
        return real(stage, folder)

    monkeypatch.setattr(attaching, "published", full)
    result = run("--model", "base", "--adapter-type", kind, *QUICK)
    assert result.exit_code == 0, result.output
    assert re.search(
        r"Warning: .*epoch_1.* could not be saved: .*No space left.* MB free\. The training goes on", result.output
    )
    assert "Checkpoint saved at epoch 1" not in result.output, "upstream does not know better"
    assert not [*(tmp_path / "output" / "checkpoints").glob("epoch_1*")]
    assert [*(tmp_path / "output" / "checkpoints").glob("epoch_2*")]


def test_a_disk_that_is_full_for_the_finished_adapter_is_a_failure(run, monkeypatch, tmp_path):
    attaching = sys.modules["sidestep_plugin.engine.wrappers.saving"]
    real = attaching.published

    def full(stage, folder):
        if folder.name == "final":
            raise OSError(28, "No space left on device")
        return real(stage, folder)

    monkeypatch.setattr(attaching, "published", full)
    result = run("--model", "base", *QUICK)
    assert result.exit_code == 1
    assert re.search(r"No space left.* MB free\. Free some space, or choose an --output-dir", result.stderr)
    # What could not become the finished adapter is there to go on from.
    assert [*(tmp_path / "output" / "checkpoints").glob("epoch_2*")]


def test_an_adapter_that_is_no_number_any_more_is_not_saved_over_a_good_one(run, trainer, monkeypatch, tmp_path):
    step = trainer.torch.optim.AdamW.step
    calls = []

    def spoiling(self, *arguments, **more):
        result = step(self, *arguments, **more)
        calls.append(1)
        if len(calls) == 2:
            with trainer.torch.no_grad():
                self.param_groups[0]["params"][0].fill_(float("nan"))
        return result

    monkeypatch.setattr(trainer.AdamW, "step", spoiling)
    result = run("--model", "base", *QUICK[2:], "--gradient-accumulation", "2", "--epochs", "4")
    assert result.exit_code == 1, result.output
    assert re.search("holds numbers that are not finite|not been a finite number", result.stderr), result.stderr
    assert not (tmp_path / "output" / "final").exists()
    assert not adapters_under(tmp_path / "output" / "interrupted")


# -- what is said before it starts -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_takes_time_is_said_before_it_is_loaded(checkout, tmp_path):
    if checkout.real:
        pytest.skip("a process of its own imports the checkout's own environment; see the whole job above")
    line = [*COMMAND, "--model", "base", "--plugin", "sidestep", "--device", "cpu", "--epochs", "1"]
    line += ["--acestep-root", checkout.root, "--checkpoint-dir", checkout.checkpoints]
    line += ["--dataset-dir", checkout.tensors, "--output-dir", tmp_path / "output"]
    done = subprocess.run([*map(str, line)], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines.pop(2).startswith("Settings: rank 64, ")
    assert lines[:3] == [
        "Importing torch ...",
        f"Importing ACE-Step's trainer from {checkout.root} ...",
        "Loading acestep-v15-base on cpu ...",
    ]


@pytest.mark.slow
def test_torch_is_imported_after_that_was_said():
    """The line would come too late if printing it took torch."""
    code = (
        "import sys, click\nfrom sidestep_plugin.cli import training\n"
        "training.say = lambda text: print(text, 'torch' in sys.modules)\n"
        "training.say_that_torch_is_imported()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "Importing torch ... False"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--epochs", 4, "--warmup-steps", 6), r"at most a tenth .*, here 1 of 12\. It shortens --warmup-steps 6 to"),
        (
            ("--epochs", 4, "--settings", "upstream"),
            r"at most a tenth of the optimizer steps, here 1 of 12\. It shortens --warmup-steps 100 to",
        ),
        (("--epochs", 4, "--warmup-steps", 3), r"It shortens --warmup-steps 3 to that"),
        (("--epochs", 4, "--warmup-steps", 1), None),
        (("--epochs", 4, "--warmup-steps", 0), None),
        (("--epochs", 4), None),  # what is recommended is no longer than that
    ],
)
def test_a_warm_up_that_ace_step_shortens_is_said(run, trainer, monkeypatch, more, says):
    """And it is so: the learning rate is at its full value when the warm-up that was said is over."""
    made, rates = trainer.SequentialLR, []

    class Watched(made):
        def step(self, *args, **kwargs):
            super().step(*args, **kwargs)
            rates.append(self.get_last_lr()[0])

    monkeypatch.setattr(trainer, "SequentialLR", Watched)
    done = run("--model", "base", "--batch-size", "2", "--gradient-accumulation", "1", *more)
    assert done.exit_code == 0, done.output
    assert re.search(says or "^", done.output) and ("Note: ACE-Step lets warm-up" in done.output) == (says is not None)
    assert done.output.find("Note: ACE-Step lets warm-up") < done.output.index("step 3/12")
    assert rates[0] == max(rates[:6]), "after one step, which is a tenth of twelve"


# -- looks -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_a_terminal_gets_a_progress_bar(checkout, tmp_path):
    if checkout.real:
        pytest.skip("a process of its own imports the checkout's own environment; see the whole job above")
    from terminal import in_a_terminal

    seen = in_a_terminal([*COMMAND, "demo", "--dir", tmp_path / "demo"], [], cwd=tmp_path, width=120)
    assert seen.code == 0
    assert "12/12" in seen.text
    bar = r"epoch 4/4, loss \(smoothed\) \d\.\d{4}, lr 1\.0e-02, \d+\.\d\d steps/s, \d:\d\d:\d\d elapsed"
    assert re.search(bar, seen.text)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="a launcher script of POSIX")
def test_the_demos_last_line_works_as_it_stands_there(tmp_path):
    """Without an activated environment, so the shell does not find acestep-train by its name."""
    launcher = tmp_path / "my env" / "acestep-train"
    launcher.parent.mkdir()
    launcher.write_text(f"#!{sys.executable}\nfrom sidestep_plugin.cli import main\nmain()\n", encoding="utf-8")
    launcher.chmod(0o755)
    plain = os.environ | {"PATH": os.defpath}
    line = ["my env/acestep-train", "demo", "--dir", "a demo"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", env=plain)
    assert done.returncode == 0, done.stderr
    first, last = map(float, re.findall(r"Mean loss: (\S+) in the first epoch, (\S+) in the last\.", done.stdout)[0])
    assert last < 0.8 * first, "the first training that somebody sees has learned nothing"
    command = done.stdout.splitlines()[-1].partition(": ")[2]
    assert command == "'my env/acestep-train' inspect 'a demo/output/base-lora'"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, env=plain)
    assert done.returncode == 0 and "acestep-v15-base" in done.stdout, done.stderr


def test_a_program_that_the_shell_finds_is_called_by_its_name(tmp_path, monkeypatch):
    from sidestep_plugin.cli.terminal import program

    script = tmp_path / ("acestep-train.exe" if os.name == "nt" else "acestep-train")
    script.touch()
    script.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "acestep-train")])
    monkeypatch.setenv("PATH", os.defpath)
    assert program() == str(tmp_path / "acestep-train")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert program() == "acestep-train"
    monkeypatch.setattr(sys, "argv", ["-c"])
    assert program() == "acestep-train"


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="closes a POSIX pipe")
def test_a_training_goes_on_when_nobody_looks_any_more(tmp_path):
    line = [*COMMAND, "demo", "--dir", str(tmp_path / "demo")]
    with running(line, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=120) == 0
    assert (tmp_path / "demo/output/base-lora/final/adapter/training_config.json").is_file()


def test_help_imports_no_torch():
    code = (
        "import sys\n"
        "from sidestep_plugin.cli import cli\n"
        "cli(sys.argv[1:], standalone_mode=False)\n"
        "print('torch' in sys.modules)\n"
    )
    for arguments in (["--help"], ["--plugin", "sidestep", "--help"], ["plugins"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        assert done.stdout.strip().endswith("False"), arguments


def test_help_teaches_the_plugins_options():
    shown = CliRunner().invoke(cli, ["--plugin", "sidestep", "--help"]).output
    for option in ("--variant", "--timestep-mode", "--cfg-ratio", "--shift", "--num-inference-steps"):
        assert option in shown
    assert CliRunner().invoke(cli, ["train", "--help"]).output == shown
    assert "--variant" not in CliRunner().invoke(cli, ["--plugin", "none", "--help"]).output


def test_plugins_lists_and_prints_json():
    shown = CliRunner().invoke(cli, ["plugins"]).output
    assert "sidestep (sidestep-plugin" in shown and "acestep_sample_timesteps" in shown
    (entry,) = [e for e in json.loads(CliRunner().invoke(cli, ["plugins", "--json"]).output) if e["name"] == "sidestep"]
    assert entry["error"] is None and "acestep_prepare_batch" in entry["hooks"] and Path(entry["distribution"]).name
