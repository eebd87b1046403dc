"""``training_config.json``: what every saved adapter says about itself, and how it is written and read."""

import errno
import json
import math
import os
import stat
import sys
import weakref
from dataclasses import dataclass, field, make_dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sidestep_plugin.hooks.metadata import acestep_adapter_saved
from sidestep_plugin.hooks.treatment import acestep_run_started
from whole_plugin import resolved

from sidestep_plugin.adapters.facts import FILE_NAME, SCHEMA_VERSION, read_training_config, write_training_config
from sidestep_plugin.adapters.header import write_header
from sidestep_plugin.run import Run, SavedAdapter

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
SHIFT_3 = [1.0, 0.955, 0.9, 0.833, 0.75, 0.643, 0.5, 0.3]
SHIFT_1 = [1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]


@dataclass
class LoRASettings:
    r: int = 64
    alpha: int = 128
    dropout: float = 0.1
    target_modules: list[str] = field(default_factory=lambda: list(TARGETS))
    bias: str = "none"


@dataclass
class LoKrSettings:
    linear_dim: int = 32
    linear_alpha: int = 16
    factor: int = -1
    target_modules: list[str] = field(default_factory=lambda: list(TARGETS))


@dataclass
class TrainingSettings:
    """Has what upstream's has: its own idea of shift and steps, and folders."""

    output_dir: str = ""
    log_dir: Path | None = None
    dataset: str = ""
    pin_memory_device: str = ""
    shift: float = 3.0
    num_inference_steps: int = 8
    learning_rate: float = 1e-4
    batch_size: int = 2
    max_epochs: int = 100
    seed: int = 42
    use_fp8: bool = False
    mixed_precision: str = "bf16"


def a_saved_adapter(tmp_path, model="acestep-v15-base", kind="lora", training=None, adapter=None, steps=0, **options):
    """Run the hook on an adapter in a folder of its own and read what it wrote."""
    whole = torch.nn.Module()
    origin = tmp_path / "checkpoints" / model
    whole.config = SimpleNamespace(_name_or_path=str(origin), timestep_mu=-0.4, timestep_sigma=1.0)
    whole.null_condition_emb = torch.nn.Parameter(torch.zeros(1, 1, 4))
    if training is None:
        output = str(tmp_path / "output")
        training = TrainingSettings(output, tmp_path / "logs", str(tmp_path), r"C:\pinned")
    adapter = adapter or (LoRASettings() if kind == "lora" else LoKrSettings())
    values = resolved(**options)
    run = Run(kind, adapter, training, values, tmp_path / "tensors", weakref.ref(whole), steps=steps)
    acestep_run_started(run)
    folder = tmp_path / "output" / "adapter"
    folder.mkdir(parents=True, exist_ok=True)
    name = "adapter_model.safetensors" if kind == "lora" else "lokr_weights.safetensors"
    save_file({"base_model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 8)}, folder / name)
    saved = SavedAdapter(folder / name, folder / name, folder, kind, epoch=3, global_step=12)
    acestep_adapter_saved(run=run, saved=saved)
    return json.loads((folder / "training_config.json").read_text(encoding="utf-8"))


def texts_in(value):
    if isinstance(value, dict):
        return [text for pair in value.items() for part in pair for text in texts_in(part)]
    if isinstance(value, list):
        return [text for part in value for text in texts_in(part)]
    return [value] if isinstance(value, str) else []


def names_in(folder):
    return sorted(file.name for file in folder.iterdir())


# -- what it says ----------------------------------------------------------------------------------------------------


def test_a_lora_on_base_says_how_it_was_trained_and_how_to_play_it(tmp_path):
    facts = a_saved_adapter(tmp_path, steps=24)
    expected = {
        "schema_version": SCHEMA_VERSION,
        "model_name": "acestep-v15-base",
        "model_variant": "base",
        "shift": 1.0,
        "num_inference_steps": 50,
        "timestep_mode": "continuous",
        "timestep_law": "maximum of two logit-normal draws",
        "timestep_mu": -0.4,
        "timestep_sigma": 1.0,
        "timestep_schedule": None,
        "cfg_ratio": 0.15,
        "adapter_type": "lora",
        "rank": 64,
        "alpha": 128,
        "dropout": 0.1,
        "target_modules": TARGETS,
        "epoch": 3,
        "global_step": 12,
        "training_steps": 24,
        "learning_rate": 1e-4,
        "batch_size": 2,
        "max_epochs": 100,
        "seed": 42,
        "use_fp8": False,
        "mixed_precision": "bf16",
    }
    assert {key: facts.get(key, "absent") for key in expected} == expected


def test_a_lokr_on_turbo_says_so(tmp_path):
    facts = a_saved_adapter(tmp_path, "acestep-v15-turbo", "lokr")
    expected = {
        "model_name": "acestep-v15-turbo",
        "model_variant": "turbo",
        "shift": 3.0,
        "num_inference_steps": 8,
        "timestep_mode": "discrete",
        "timestep_law": "uniform over a schedule",
        "timestep_mu": None,
        "timestep_sigma": None,
        "cfg_ratio": 0.0,
        "adapter_type": "lokr",
        "rank": 32,
        "alpha": 16,
        "target_modules": TARGETS,
    }
    assert {key: facts.get(key, "absent") for key in expected} == expected
    assert [round(t, 3) for t in facts["timestep_schedule"]] == SHIFT_3


def test_an_adapter_on_turbo_shift1_is_played_at_shift_one(tmp_path):
    facts = a_saved_adapter(tmp_path, "acestep-v15-turbo-shift1")
    assert (facts["model_variant"], facts["shift"], facts["num_inference_steps"]) == ("turbo", 1.0, 8)
    assert facts["timestep_schedule"] == SHIFT_1


def test_the_users_shift_and_steps_are_what_is_said(tmp_path):
    facts = a_saved_adapter(tmp_path, shift=2.5, num_inference_steps=27, cfg_ratio=0.3)
    assert (facts["shift"], facts["num_inference_steps"], facts["cfg_ratio"]) == (2.5, 27, 0.3)


def test_versions_are_those_that_are_installed(tmp_path):
    facts = a_saved_adapter(tmp_path)
    assert facts["torch_version"] == version("torch")
    assert facts["peft_version"] == version("peft")
    assert facts["sidestep_plugin_version"] == version("sidestep-plugin")


@pytest.mark.parametrize("kind", ["lora", "lokr"])
@pytest.mark.parametrize("model", ["acestep-v15-base", "acestep-v15-turbo", "acestep-v15-turbo-shift1"])
def test_no_text_in_it_is_a_path_of_whoever_trained_it(model, kind, tmp_path):
    facts = a_saved_adapter(tmp_path, model, kind)
    texts = texts_in(facts)
    assert model in texts
    assert [text for text in texts if "/" in text or "\\" in text or tmp_path.name in text] == []
    assert {"output_dir", "log_dir", "dataset", "pin_memory_device"}.isdisjoint(facts)


def test_settings_of_upstreams_never_stand_in_for_what_was_done(tmp_path):
    clashing = {"cfg_ratio": 0.9, "timestep_mu": 9.0, "rank": 1, "epoch": 99, "schema_version": 7, "learning_rate": 0.5}
    training = make_dataclass("Clashing", [(name, float, value) for name, value in clashing.items()])()
    facts = a_saved_adapter(tmp_path, training=training)
    own = {"cfg_ratio": 0.15, "timestep_mu": -0.4, "rank": 64, "epoch": 3, "schema_version": SCHEMA_VERSION}
    assert {key: facts[key] for key in own} == own
    assert facts["learning_rate"] == 0.5


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_setting_that_json_cannot_hold_costs_no_adapter(value, tmp_path):
    training = make_dataclass("Unbounded", [("max_grad_norm", float, value), ("seed", int, 1)])()
    facts = a_saved_adapter(tmp_path, training=training)
    assert facts["seed"] == 1
    assert facts["model_variant"] == "base"


@pytest.mark.parametrize("targets", [None, "all-linear", ("q_proj", "v_proj"), ["q_proj"]])
def test_targets_are_kept_as_they_were_given(targets, tmp_path):
    facts = a_saved_adapter(tmp_path, adapter=LoRASettings(target_modules=targets))
    assert facts["target_modules"] == (list(targets) if isinstance(targets, tuple) else targets)


def test_unknown_configurations_leave_gaps_and_no_crash(tmp_path):
    facts = a_saved_adapter(tmp_path, training=SimpleNamespace(seed=1), adapter=SimpleNamespace())
    assert (facts["rank"], facts["alpha"], facts["target_modules"]) == (None, None, None)
    assert facts["shift"] == 1.0


# -- writing ---------------------------------------------------------------------------------------------------------


def test_the_file_is_plain_utf8_json_that_reads_back(tmp_path):
    facts = {"model_name": "modèle-音楽", "rank": 8, "schedule": [1.0, 0.5], "none": None}
    file = write_training_config(tmp_path, facts)
    assert file == tmp_path / FILE_NAME
    raw = file.read_bytes()
    assert "modèle-音楽" in raw.decode("utf-8")
    assert raw.endswith(b"}\n")
    assert b"\r" not in raw
    assert json.loads(raw) == read_training_config(tmp_path) == facts
    assert names_in(tmp_path) == [FILE_NAME]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions")
def test_the_file_is_as_open_as_weights_are(tmp_path):
    assert stat.S_IMODE(write_training_config(tmp_path, {}).stat().st_mode) == 0o644


def test_a_file_that_is_there_is_replaced_whole(tmp_path):
    write_training_config(tmp_path, {"long": "x" * 10_000})
    write_training_config(tmp_path, {"a": 1})
    assert read_training_config(tmp_path) == {"a": 1}
    assert names_in(tmp_path) == [FILE_NAME]


@pytest.mark.parametrize("failing", ["replace", "fsync"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()], ids=["disk", "Ctrl-C"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(failing, error, tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise error

    before = write_training_config(tmp_path, {"a": 1}).read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(os, failing, fail)
        with pytest.raises(type(error)):
            write_training_config(tmp_path, {"a": 2})
    assert (tmp_path / FILE_NAME).read_bytes() == before
    assert names_in(tmp_path) == [FILE_NAME]


@pytest.mark.parametrize("value", [math.nan, math.inf, object(), Path("x")], ids=["nan", "inf", "object", "path"])
def test_facts_that_json_cannot_hold_write_nothing(value, tmp_path):
    with pytest.raises((ValueError, TypeError)):
        write_training_config(tmp_path, {"a": value})
    assert names_in(tmp_path) == []


def test_a_header_has_no_nan(tmp_path):
    """Whoever tells a fact, and however deep in it the number is."""
    file = tmp_path / "adapter_model.safetensors"
    save_file({"base_model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(1, 2)}, file)
    write_header(file, {"adapter_type": "lora", "a": math.nan, "b": [1.0, -math.inf], "c": {"d": math.inf}, "e": 0.5})
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    ours = {key: json.loads(text) for key, text in header.items() if key in ("sidestep.b", "sidestep.c", "sidestep.e")}
    assert ours == {"sidestep.b": [1.0, None], "sidestep.c": {"d": None}, "sidestep.e": 0.5}
    assert "sidestep.a" not in header and "NaN" not in str(header) and "Infinity" not in str(header)


def test_a_missing_folder_is_an_error_and_not_made(tmp_path):
    with pytest.raises(OSError):
        write_training_config(tmp_path / "nowhere", {})
    assert names_in(tmp_path) == []


# -- reading ---------------------------------------------------------------------------------------------------------


def test_a_folder_without_the_file_has_no_facts(tmp_path):
    assert read_training_config(tmp_path) is None
    assert read_training_config(tmp_path / "nowhere") is None
    (tmp_path / FILE_NAME).mkdir()
    assert read_training_config(tmp_path) is None


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1, 2]", b'"text"', b"null", b'{"a": "\xff"}', b"[" * 100_000, b"1" * 5000],
    ids=["empty", "cut off", "list", "text", "null", "not UTF-8", "too deep", "too long a number"],
)
def test_a_file_that_holds_no_object_has_no_facts(content, tmp_path):
    (tmp_path / FILE_NAME).write_bytes(content)
    assert read_training_config(tmp_path) is None
