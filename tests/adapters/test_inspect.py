"""``acestep-train inspect``: whoever wrote an adapter, what it says is shown, what it does not say is listed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from sidestep_plugin.adapters.facts import SCHEMA_VERSION
from sidestep_plugin.adapters.header import usage_hint
from sidestep_plugin.adapters.weights_file import read_weights_file, write_metadata
from sidestep_plugin.cli import cli

LAYERS = [f"layers.{number}.self_attn.{name}" for number in range(2) for name in ("q_proj", "v_proj")]
TO_GENERATE = {"base": (1.0, 50, "on"), "turbo": (3.0, 8, "off")}
PEFT = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "base_model_name_or_path": None}
SIDE_STEP = {
    **{"model_variant": "base", "is_turbo": False, "shift": 1.0, "num_inference_steps": 50, "cfg_ratio": 0.15},
    **{"timestep_mode": "continuous", "timestep_mu": -0.4, "timestep_sigma": 1.0, "batch_size": 1, "run_name": "jazz"},
    **{"checkpoint_dir": "/home/anna/ACE-Step/checkpoints", "dataset_dir": "D:\\anna\\songs", "output_dir": "./anna"},
}


def inspect(path):
    """Exit code, lines for people, and the JSON; standard error holds nothing but problems."""
    text = CliRunner().invoke(cli, ["inspect", str(path)], catch_exceptions=False)
    as_json = CliRunner().invoke(cli, ["inspect", str(path), "--json"], catch_exceptions=False)
    assert text.exit_code == as_json.exit_code and as_json.stderr == ""
    assert all(line.startswith("Problem: ") for line in text.stderr.splitlines())
    return text.exit_code, text.stdout.splitlines(), json.loads(as_json.stdout)


def says(path):
    code, lines, said = inspect(path)
    assert code == 0 and said["problems"] == []
    return "\n".join(lines), said


def lora(folder, name="{}.lora_{}.weight", parts="AB", *, alpha=None, metadata=None, config=None, beside=None):
    """A LoRA of rank 4 on four layers, named as some program names them."""
    tensors = {}
    for layer in LAYERS:
        for part, shape in zip(parts, ((4, 8), (8, 4)), strict=True):
            tensors[name.format(layer, part)] = torch.ones(shape, dtype=torch.bfloat16)
        if alpha is not None:
            tensors[name.partition(".lora")[0].format(layer) + ".alpha"] = alpha
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata=metadata)
    for file, content in (("adapter_config.json", config), ("training_config.json", beside)):
        if content is not None:
            (folder / file).write_text(json.dumps(content), encoding="utf-8")
    return folder


# -- from this plugin ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "lokr"])
@pytest.mark.parametrize("variant", ["base", "turbo"])
def test_an_adapter_of_ours_says_everything_wherever_its_file_goes(variant, kind, train, tmp_path):
    words = {"title": "夜曲 – Ноктюрн 🎵", "trigger": "123", "author": "null", "license": '["CC0"]'}
    output = train(variant, kind, options=words).output
    (folder,) = (file.parent for file in output.glob("final/**/*.safetensors"))
    text, said = says(folder)
    shift, steps, cfg = TO_GENERATE[variant]
    assert said["generate"] == {
        **{"shift": shift, "num_inference_steps": steps, "cfg": cfg, "guess": False},
        "because": "saved with the adapter",
    }
    assert f"Generate:  shift {shift}, {steps} steps, CFG {cfg}\n" in text and "guess" not in text
    facts = json.loads((folder / "training_config.json").read_text(encoding="utf-8"))
    assert said["facts"] == {key: value for key, value in facts.items() if value is not None}
    assert {key: said["facts"][key] for key in words} == words and all(word in text for word in words.values())
    assert (said["missing"], said["notes"], said["intact"], said["adapter_type"]) == ([], [], True, kind)
    assert said["written_by"] == f"sidestep-plugin {facts['sidestep_plugin_version']}"
    assert set(said["strengths"]) == {{"lora": "2.0", "lokr": "1.0"}[kind]}, "a LoKr of this size is full matrices"
    assert says(output) == (text, said), "the folder of the run means its final adapter"

    moved = tmp_path / "moved" / "夜曲 (final).safetensors"
    moved.parent.mkdir()
    shutil.copyfile(said["file"], moved)
    moved_text, moved_said = says(moved)
    assert moved_text.splitlines()[1:] == text.splitlines()[1:]
    assert moved_text.splitlines()[0] == moved_said["file"] == str(moved)
    assert moved_said | {"file": said["file"]} == said
    assert says(moved.parent) == (moved_text, moved_said)


MODELS = {
    "acestep-v15-turbo-shift1": ("turbo-shift1", "shift 1.0, 8 steps, CFG off"),
    "acestep-v15-turbo-shift3": ("turbo-shift3", "shift 3.0, 8 steps, CFG off"),
    "acestep-v15-turbo-continuous": ("turbo-continuous", "shift 3.0, 8 steps, CFG off"),
    "acestep-v15-turbo": ("turbo", "shift 3.0, 8 steps, CFG off"),
    "my_Turbo.Shift1": ("turbo-shift1", "shift 1.0, 8 steps, CFG off"),
    "acestep-v15-base": ("base", "shift 1.0, 50 steps, CFG on"),
    "base-shift1": ("base", "shift 1.0, 50 steps, CFG on"),
}


@pytest.mark.parametrize("model", MODELS)
def test_the_model_is_shown_by_its_own_name(model, tmp_path):
    """turbo-shift1 is generated with at another shift than the other turbo models."""
    name, generate = MODELS[model]
    text, said = says(
        lora(tmp_path, "base_model.model.{}.lora_{}.weight", config=PEFT | {"base_model_name_or_path": model})
    )
    assert f"LoRA for ACE-Step 1.5 {name} ({model}), written by" in text
    assert f"{generate} (a guess: not in the file; these are the usual settings for {name} models)" in text
    assert said["facts"]["model_variant"] == name.partition("-")[0]
    facts = {"model_variant": name.partition("-")[0], "model_name": model, "shift": 1.0, "num_inference_steps": 8}
    assert usage_hint(facts).startswith(f"ACE-Step 1.5 {name}: shift 1.0, 8 steps")


def test_a_changed_tensor_is_a_problem(train):
    weights = next(train("base", max_epochs=1).output.glob("final/**/*.safetensors"))
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    code, _, said = inspect(weights)
    assert code == 2 and said["intact"] is False
    assert "do not match the hash in the header" in said["problems"][0]


def test_files_that_contradict_each_other_are_noted_and_the_header_is_taken(train, tmp_path):
    weights = next(train("base", max_epochs=1).output.glob("final/**/*.safetensors"))
    beside = weights.with_name("training_config.json")
    facts = json.loads(beside.read_text(encoding="utf-8"))
    beside.write_text(json.dumps(facts | {"shift": 3.0, "model_variant": "turbo"}), encoding="utf-8")
    text, said = says(weights.parent)
    assert (said["generate"]["shift"], said["facts"]["model_variant"]) == (1.0, "base")
    assert (
        "Note:      training_config.json has shift = 3.0, but the header of the weights has 1.0. The header is used."
        in text
    )
    assert len(said["notes"]) == 2 and "model_variant = turbo" in "".join(said["notes"])

    beside.unlink()
    config = weights.with_name("adapter_config.json")
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 4'))
    (note,) = says(weights.parent)[1]["notes"]
    assert note == "It was saved with strength 2, but adapter_config.json would give it strength 1."


@pytest.mark.parametrize("place", ["header", "folder"])
def test_a_newer_description_is_read_as_far_as_it_is_known(place, tmp_path):
    facts = {"schema_version": SCHEMA_VERSION + 1, "model_variant": "sft", "shift": 1.5, "num_inference_steps": 60}
    facts["mood"] = ["calm"]
    folder = lora(
        tmp_path, "base_model.model.{}.lora_{}.weight", config=PEFT, beside=facts if place == "folder" else None
    )
    if place == "header":
        texts = {f"sidestep.{k}": v if isinstance(v, str) else json.dumps(v) for k, v in facts.items()}
        write_metadata(read_weights_file(folder / "adapter_model.safetensors"), texts)
    text, said = says(folder)
    assert f"Note:      Its facts were written by a newer version of this program (schema {SCHEMA_VERSION + 1}" in text
    assert {key: said["facts"][key] for key in facts} == facts
    assert "shift 1.5, 60 steps, CFG on" in text and "the model" in said["missing"]


# -- from others -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plugins", [None, ()], ids=["never attached", "no plugins"])
def test_a_lora_of_upstreams_says_what_peft_says_and_the_rest_is_a_guess(plugins, train, tmp_path):
    weights = next(train("base", plugins=plugins, max_epochs=1).output.glob("final/**/*.safetensors"))
    text, said = says(weights.parent)
    assert said["written_by"] == "ACE-Step or another PEFT trainer" and said["intact"] is None
    assert said["facts"]["model_name"] == "acestep-v15-base" and str(tmp_path) not in text.partition("\n")[2]
    assert said["strengths"] == {"2.0": said["layers"]}
    assert said["missing"] == ["shift", "number of steps", "number of songs", "training steps"]
    assert said["generate"]["guess"] is True
    assert (
        "shift 1.0, 50 steps, CFG on (a guess: not in the file; these are the usual settings for base models)" in text
    )

    shutil.copyfile(weights, tmp_path / "alone.safetensors")
    text, said = says(tmp_path / "alone.safetensors")
    assert said["generate"]["shift"] is None and "Generate:  unknown: the files do not say which model" in text
    assert "rank 4, alpha unknown: programs without an alpha use strength 1" in text
    assert {"the model", "its variant", "alpha"} <= set(said["missing"])


@pytest.mark.parametrize("variant", ["base", "turbo"])
def test_a_lokr_of_upstreams_says_dimension_and_alpha_and_its_shift_is_not_believed(variant, train):
    output = train(variant, "lokr", plugins=None, max_epochs=1).output
    text, said = says(output)
    assert (said["written_by"], said["adapter_type"]) == ("ACE-Step", "lokr")
    if b"run_metadata" not in next(output.glob("final/**/*.safetensors")).read_bytes():
        pytest.skip("this version of ACE-Step writes no record of the run into a LoKr's header")
    assert "1 (dimension 4, alpha 4, without effect: these are full matrices)" in text
    assert (said["facts"]["rank"], said["facts"]["alpha"]) == (4, 4), "LyCORIS sets alpha to the dimension there"
    assert said["strengths"] == {"1.0": said["trained_layers"]}
    assert said["generate"]["shift"] is None and said["generate"]["guess"] is True
    assert "shift" not in said["facts"] and "are the same for every model. These are ignored." in said["notes"][0]
    assert str(output) not in text.partition("\n")[2], "its header holds local paths"


@pytest.mark.parametrize("name", ["training_config.json", "sidestep_training_config.json"])
@pytest.mark.parametrize("place", ["beside", "above final", "above best"])
def test_side_steps_file_is_read_and_its_paths_stay_out(place, name, tmp_path):
    run = tmp_path / "run"
    folder = run if place == "beside" else run / place.split()[1]
    config = PEFT | {"base_model_name_or_path": "/home/anna/ACE-Step/checkpoints/acestep-v15-base"}
    lora(folder, "base_model.model.{}.lora_{}.weight", config=config)
    (run / name).write_text(json.dumps(SIDE_STEP), encoding="utf-8")
    text, said = says(folder)
    assert said["written_by"] == "Side-Step" and said["facts"]["model_variant"] == "base"
    assert said["generate"]["guess"] is False and "shift 1.0, 50 steps, CFG on\n" in text
    assert "condition dropout 15 %" in text and said["facts"]["title"] == "jazz"
    assert said["missing"] == ["number of songs", "training steps"]
    about = text.partition("\n")[2] + json.dumps(said["facts"])
    assert not re.search("anna|checkpoint_dir|dataset_dir|output_dir", about)


def test_side_steps_turbo_without_a_shift_is_a_guess(tmp_path):
    beside = {"is_turbo": True, "shift": None}
    text, said = says(lora(tmp_path, "base_model.model.{}.lora_{}.weight", config=PEFT, beside=beside))
    assert (
        "shift 3.0, 8 steps, CFG off (a guess: not in the file; these are the usual settings for turbo models)" in text
    )
    assert {"shift", "number of steps"} <= set(said["missing"])


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prefix", ["lora_unet_decoder_", "lora_unet_", "lycoris_decoder_", "lycoris_"])
def test_a_kohya_style_file_says_what_its_keys_say(prefix, dtype, tmp_path):
    metadata = {
        **{"ss_network_dim": "4", "ss_network_alpha": "2.0", "ss_sd_model_name": "C:\\models\\acestep-v15-sft"},
        **{"ss_steps": "1200", "ss_num_train_items": "12", "ss_output_name": "jazz", "modelspec.author": "Anna"},
    }
    tensors = {}
    for layer in LAYERS:
        name = prefix + layer.replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": torch.ones(4, 8), f"{name}.lora_up.weight": torch.ones(8, 4)}
        tensors[f"{name}.alpha"] = torch.tensor(2, dtype=dtype)
    save_file(tensors, tmp_path / "jazz.safetensors", metadata=metadata)
    text, said = says(tmp_path)
    assert said["written_by"] == "a trainer with kohya-style metadata" and said["targets"] == ["q_proj", "v_proj"]
    assert said["strengths"] == {"0.5": 4} and "0.5 (rank 4, alpha 2)" in text
    expected = {"title": "jazz", "author": "Anna", "model_name": "acestep-v15-sft", "model_variant": "sft", "rank": 4}
    expected |= {"alpha": 2, "songs": 12, "training_steps": 1200}
    assert {key: said["facts"].get(key) for key in expected} == expected
    assert said["generate"]["guess"] is True and "CFG on (a guess: not in the file" in text
    assert said["missing"] == ["shift", "number of steps"]


def test_a_file_of_diffusers_has_its_strength_from_its_header(tmp_path):
    config = {"r": 4, "lora_alpha": 16, "alpha_pattern": {"layers.1.self_attn.to_q": 4}, "use_dora": False}
    header = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in config.items()})}
    name = "transformer.{}.lora_{}.weight"
    folder = lora(tmp_path, name, metadata=header)
    tensors = {
        key.replace("q_proj", "to_q").replace("v_proj", "to_v"): t
        for key, t in load_file(folder / "adapter_model.safetensors").items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata=header)
    text, said = says(folder)
    assert said["targets"] == ["q_proj", "v_proj"] and said["strengths"] == {"1.0": 1, "4.0": 3}
    assert "1 to 4 (rank 4, alphas 4 to 16)" in text


def test_a_header_of_lycoris_alone_is_a_lokr_of_unknown_origin(tmp_path):
    tensors = {f"lycoris_{layer.replace('.', '_')}.lokr_w1": torch.ones(2, 2) for layer in LAYERS}
    tensors |= {f"lycoris_{layer.replace('.', '_')}.lokr_w2": torch.ones(4, 4) for layer in LAYERS}
    save_file(tensors, tmp_path / "lokr_weights.safetensors", metadata={"ss_network_module": "lycoris"})
    _, said = says(tmp_path)
    assert (said["adapter_type"], said["layers"], said["targets"]) == ("lokr", 4, ["q_proj", "v_proj"])
    assert said["missing"] == [
        *("the model", "its variant", "shift", "number of steps", "alpha", "number of songs", "training steps")
    ]


# -- as people have their files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adapter_config.json", "training_config.json"])
def test_a_file_that_an_editor_on_windows_has_saved_is_read(name, tmp_path):
    """Some put a mark before the first character, and all end lines in their own way."""
    folder = lora(tmp_path, "base_model.model.{}.lora_{}.weight", config=PEFT, beside=SIDE_STEP)
    text = json.dumps(json.loads((folder / name).read_text(encoding="utf-8")), indent=2)
    (folder / name).write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert says(folder)[1]["strengths"] == {"2.0": 4}


@pytest.mark.parametrize("title", ["夜\u3000曲", "a\u00a0b", "\U0001f469\u200d\U0001f3a4", "नि\u200dमा", "a\u00adb"])
def test_writing_that_is_not_latin_is_no_control_character(title, tmp_path):
    metadata = {"ss_output_name": title, "ss_tag_frequency": json.dumps({title: 3}, ensure_ascii=False)}
    _, said = says(lora(tmp_path, "base_model.model.{}.lora_{}.weight", config=PEFT, metadata=metadata))
    assert said["facts"]["title"] == title


def test_other_files_in_the_folder_change_nothing(tmp_path):
    """A copy for ComfyUI, and what macOS leaves on foreign disks."""
    folder = lora(tmp_path, "base_model.model.{}.lora_{}.weight", config=PEFT, beside=SIDE_STEP)
    (folder / "adapter_model.safetensors").rename(folder / "jazz.safetensors")
    before = says(folder)
    assert before[1]["written_by"] == "Side-Step"
    (folder / "._jazz.safetensors").write_bytes(b"\0\5\x16\7")
    assert says(folder) == says(folder / "jazz.safetensors") == before
    done = CliRunner().invoke(cli, ["export", str(folder), "--to", "comfyui"])
    assert done.exit_code == 0, done.output
    assert says(folder) == says(folder / "jazz.safetensors") == before


def test_a_console_that_cannot_show_a_title_shows_the_rest(tmp_path):
    folder = lora(tmp_path, "base_model.model.{}.lora_{}.weight", config=PEFT, beside=SIDE_STEP | {"run_name": "夜曲"})
    line = [sys.executable, "-c", "from sidestep_plugin.cli import main; main()", "inspect", folder]
    environment = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    done = subprocess.run(line, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert b"Title:     ??" in done.stdout and b"shift 1.0, 50 steps" in done.stdout


def test_an_alpha_pattern_that_is_not_read_is_noted(tmp_path):
    config = PEFT | {"alpha_pattern": {"o_proj": 2, "layers.*q_proj": 3}}
    text, said = says(lora(tmp_path, "base_model.model.{}.lora_{}.weight", config=config))
    assert said["notes"] == ["The alphas are unknown: alpha_pattern has the regular expression 'layers.*q_proj'."]
    assert "rank 4, alpha unknown" in text and said["strengths"] == {}


def test_a_rank_that_differs_by_layer_is_a_span(tmp_path):
    config = PEFT | {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "use_rslora": False}
    folder = lora(tmp_path, "base_model.model.{}.lora_{}.weight", config=config)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.layers.1.self_attn.q_proj"
    tensors |= {f"{name}.lora_A.weight": torch.ones(2, 8), f"{name}.lora_B.weight": torch.ones(8, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    text, said = says(folder)
    assert said["ranks"] == {"2": 1, "4": 3} and said["strengths"] == {"2.0": 3, "4.0": 1}
    assert "2 to 4 (ranks 2 to 4, alpha 8)" in text and "rank" not in said["facts"]
