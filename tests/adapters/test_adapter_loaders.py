"""Saved adapters are still those that upstream wrote: its loaders, PEFT's and safetensors' read them as before.

And they say what they are under the keys that other people's tools know, and nothing of whoever trained them.
"""

import hashlib
import json
import signal
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file

from sidestep_plugin.cli import cli
from sidestep_plugin.launch.launch import Launch

KINDS = ["lora", "lokr"]
NAMES = {"lora": "adapter_model.safetensors", "lokr": "lokr_weights.safetensors"}
HINT = "ACE-Step 1.5 base: shift 1.0, 50 steps, CFG on"


def taken_apart(file):
    """A file's header and its tensor bytes, by the format's description alone."""
    raw = file.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    return header.pop("__metadata__", {}), header, raw[end:]


def weights_under(folder):
    return sorted(file for name in NAMES.values() for file in folder.rglob(name))


# -- the same tensors ------------------------------------------------------------------------------------------------


@pytest.fixture
def both(train, load):
    """The same training by upstream alone and with the plugin, on turbo, which the plugin trains as upstream does."""

    def make(kind, **settings):
        runs = [train("turbo", kind, plugins=plugins, **settings) for plugins in (None, ("sidestep",))]
        return [next(iter(weights_under(run.output / "final"))) for run in runs]

    return make


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_header_is_another(both, kind):
    theirs, ours = (taken_apart(file) for file in both(kind))
    assert ours[1] == theirs[1], "tensors' names, dtypes, shapes, places"
    assert list(ours[1]) == list(theirs[1]), "and their order"
    assert ours[2] == theirs[2], "their bytes"
    assert ours[0] != theirs[0] and theirs[0].keys() <= ours[0].keys()


def test_the_files_beside_a_lora_are_upstreams_own(both):
    theirs, ours = (
        json.loads((file.parent / "adapter_config.json").read_text(encoding="utf-8")) for file in both("lora")
    )
    assert ours == theirs | {"base_model_name_or_path": None}


def check_live(decoder, expected):
    live = {name.replace(".default.", "."): value for name, value in decoder.named_parameters() if "lora_" in name}
    assert live.keys() == expected.keys() and all(torch.equal(live[key], expected[key]) for key in expected)


def test_peft_loads_it_as_before(both, load):
    from peft import PeftModel

    theirs, ours = both("lora")
    loaded = PeftModel.from_pretrained(load("turbo").model.decoder, ours.parent)
    check_live(loaded, load_file(theirs))
    assert {module.scaling["default"] for module in loaded.modules() if hasattr(module, "lora_A")} == {2.0}


def test_upstreams_loader_loads_a_lora_as_before(both, trainer, load):
    theirs, ours = both("lora")
    try:
        from acestep.training.lora_checkpoint import load_lora_weights
    except ImportError:
        from acestep.training.lora_utils import load_lora_weights
    model = load_lora_weights(load("turbo").model, str(ours.parent))
    check_live(model.decoder, load_file(theirs))


def test_upstreams_loader_loads_a_lokr_as_before(both, trainer, load, require_kind):
    require_kind("lokr")
    theirs, ours = both("lokr")
    from acestep.training.configs import LoKRConfig
    from acestep.training.lokr_utils import inject_lokr_into_dit, load_lokr_weights

    configs = [taken_apart(file)[0]["lokr_config"] for file in (theirs, ours)]
    assert configs[0] == configs[1]
    config = LoKRConfig(**json.loads(configs[1]))
    assert (config.linear_dim, config.linear_alpha) == (4, 8)
    _, network, _ = inject_lokr_into_dit(load("turbo").model, config)
    assert not load_lokr_weights(network, str(ours)), "missing or unexpected tensors"
    tensors, expected = network.state_dict(), load_file(theirs)
    assert tensors.keys() == expected.keys() and all(torch.equal(tensors[key], expected[key]) for key in expected)


def test_the_apps_loader_reads_a_lokrs_settings_as_before(both, checkout, require_kind):
    if not checkout.real:
        pytest.skip("the app is part of a real checkout: pytest --acestep-root DIR")
    require_kind("lokr")
    lifecycle = pytest.importorskip("acestep.core.generation.handler.lora.lifecycle", exc_type=ImportError)
    theirs, ours = (lifecycle._load_lokr_config(str(file)) for file in both("lokr"))
    assert ours == theirs and (ours.linear_dim, ours.linear_alpha) == (4, 8)


# -- what they say ---------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(checkout, trainer, require_kind, tmp_path, monkeypatch):
    """Train from the command line, once to the end and once until Ctrl-C | returns every saved weights file."""

    def train(kind, *, plugin="sidestep", model="base", options=()):
        require_kind(kind)
        monkeypatch.chdir(tmp_path)
        # It would change the log of the tests after this one.
        monkeypatch.setattr("sidestep_plugin.cli.quiet.quiet_upstream", lambda: None)
        line = [f"--plugin={plugin or 'none'}"]
        line += ["--model", model, "--adapter-type", kind, "--epochs", "2", "--batch-size", "2", "--save-every", "1"]
        line += ["--rank", "4", "--alpha", "8", "--device", "cpu", "--acestep-root", checkout.root]
        line += ["--checkpoint-dir", checkout.checkpoints, "--dataset-dir", checkout.tensors]
        line += ["--val-split", "0.34"] if kind == "lora" and not checkout.real else []
        line += ["--output-dir", tmp_path / "output", "--overwrite", *options]
        finished = CliRunner().invoke(cli, [*map(str, line)], catch_exceptions=False)
        assert finished.exit_code == 0, finished.output
        with monkeypatch.context() as patched:
            patched.setattr(Launch, "messages", pressing_ctrl_c(Launch.messages))
            stopped = CliRunner().invoke(cli, [*map(str, line), "--epochs", "50", "--save-every", "1"])
        assert stopped.exit_code == 130, stopped.output
        return weights_under(tmp_path / "output")

    return train


def pressing_ctrl_c(messages):
    def with_ctrl_c(launch):
        pressed = False
        for message in messages(launch):
            if message[2].startswith("💾") and not pressed:  # the first checkpoint is there
                pressed = True
                signal.raise_signal(signal.SIGINT)
            yield message

    return with_ctrl_c


@pytest.mark.parametrize("kind", KINDS)
def test_every_saved_file_says_what_it_is(saved, checkout, tmp_path, kind):
    files = saved(kind, options=("--title", "Jazz", "--trigger", "a jazz band"))
    places = {file.relative_to(tmp_path / "output").parts[0] for file in files}
    assert places == {"checkpoints", "final", "interrupted"}
    if kind == "lora" and not checkout.real:
        assert [file for file in files if "best" in file.parts], "the best one by validation too"
    for file in files:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata()
            assert all(opened.get_tensor(key).isfinite().all() for key in opened.keys())  # noqa: SIM118
        texts, _, data = taken_apart(file)
        assert header == texts and all(type(text) is str for pair in texts.items() for text in pair)
        assert header["modelspec.sai_model_spec"] == "1.0.1"
        assert header["modelspec.architecture"] == f"ace-step-1.5/{kind}"
        assert header["modelspec.implementation"] == "https://github.com/ace-step/ACE-Step-1.5"
        assert header["modelspec.title"] == "Jazz"
        assert header["modelspec.usage_hint"] == f"{HINT}; trigger: a jazz band"
        assert header["modelspec.hash_sha256"] == "0x" + hashlib.sha256(data).hexdigest()
        # LyCORIS makes full matrices of a LoKr of this size, and sets alpha to the dimension.
        alpha = {"lora": "8", "lokr": "4"}[kind]
        assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", alpha)
        assert (header["sidestep.shift"], header["sidestep.num_inference_steps"]) == ("1.0", "50")


def test_a_lora_outside_the_blocks_is_one_for_ace_step_too(saved):
    """Whatever layers were asked for: the training goes to its end, and our own adapter is recognised afterwards."""
    files = saved("lora", options=("--target-modules", "condition_embedder", "--export", "comfyui"))
    for file in files:
        assert file.with_name("comfyui_lora.safetensors").is_file()
        assert CliRunner().invoke(cli, ["inspect", str(file)]).exit_code == 0


def test_without_a_trigger_the_hint_is_this_one_sentence(saved):
    assert {taken_apart(file)[0]["modelspec.usage_hint"] for file in saved("lora")} == {HINT}


def test_a_changed_tensor_no_longer_has_the_hash(saved, tmp_path):
    file = saved("lora")[0]
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    texts, _, data = taken_apart(file)
    assert texts["modelspec.hash_sha256"] != "0x" + hashlib.sha256(data).hexdigest()


@pytest.mark.slow
def test_a_lokrs_own_record_of_the_run_says_the_same(saved):
    for file in saved("lokr"):
        header = taken_apart(file)[0]
        record = json.loads(header.get("run_metadata", "{}"))
        assert record.get("shift", 1.0) == 1.0 and record.get("num_inference_steps", 50) == 50
        assert json.loads(header["lokr_config"])["linear_dim"] == 4


# -- what they do not say --------------------------------------------------------------------------------------------


def places_told(files, *places):
    """Which files of the adapters name a local folder; all are looked through but the optimizer's state."""
    told = set()
    for folder in {file.parent for file in files}:
        for file in folder.iterdir():
            if file.is_file() and file.name not in ("training_state.pt", "resume_state.pt"):
                text = file.read_bytes()
                spellings = {spelling for place in places for spelling in (str(place), json.dumps(str(place))[1:-1])}
                told |= {(file.name, spelling) for spelling in spellings if spelling.encode() in text}
    return told


@pytest.mark.parametrize("kind", KINDS)
def test_no_file_of_an_adapter_names_a_local_folder(saved, checkout, tmp_path, kind):
    local = (tmp_path, checkout.root, checkout.checkpoints, checkout.tensors, Path.home(), Path.cwd())
    files = saved(kind)
    assert {"checkpoints", "final", "interrupted"} == {file.relative_to(tmp_path / "output").parts[0] for file in files}
    beside = {other.name for file in files for other in file.parent.iterdir()}
    assert {"training_config.json"} <= beside and (kind == "lokr" or {"adapter_config.json", "README.md"} <= beside)
    assert places_told(files, *local) == set()


@pytest.mark.parametrize("kind", KINDS)
def test_upstream_alone_does_name_them(saved, checkout, tmp_path, kind):
    """So the test above would notice."""
    files = saved(kind, plugin=None)
    if kind == "lokr" and all(b"run_metadata" not in file.read_bytes() for file in files):
        pytest.skip("this version of ACE-Step writes no record of the run into a LoKr's header")
    told = {name for name, _ in places_told(files, tmp_path, checkout.checkpoints)}
    expected = {"lora": {"adapter_config.json", "README.md"}, "lokr": {"lokr_weights.safetensors"}}[kind]
    assert told & expected
