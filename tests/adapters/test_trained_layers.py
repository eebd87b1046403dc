"""An adapter says which of its layers change anything: LyCORIS saves zeros for layers that are not trained."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sidestep_plugin.adapters.layers import read_adapter
from sidestep_plugin.adapters.targets import check_targets
from sidestep_plugin.cli import cli
from sidestep_plugin.errors import Refusal

from .test_inspect import PEFT, inspect, lora, says

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture
def trained(checkout, trainer, require_kind, tmp_path, monkeypatch):
    """Train from the command line | returns the result and the output folder."""
    monkeypatch.setattr("sidestep_plugin.cli.quiet.quiet_upstream", lambda: None)

    def run(kind, *arguments, output=tmp_path / "output"):
        require_kind(kind)
        folders = ["--acestep-root", checkout.root, "--checkpoint-dir", checkout.checkpoints]
        folders += ["--dataset-dir", checkout.tensors, "--output-dir", output]
        line = ["--plugin", "sidestep", "--model", "base", "--adapter-type", kind, "--device", "cpu", "--epochs", "1"]
        line += ["--rank", "4", "--alpha", "8", "--learning-rate", "0.01", "--warmup-steps", "0"]
        line = [*map(str, [*line, *folders, *arguments])]
        return CliRunner().invoke(cli, line, catch_exceptions=False), output

    return run


def save_lokr(folder, layers):
    """A LoKr | each layer's tensors by their names."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"lycoris_{layer.replace('.', '_')}.{name}": tensor
        for layer, parts in layers.items()
        for name, tensor in parts.items()
    }
    save_file(tensors, folder / "lokr_weights.safetensors")
    return folder


# -- a LoKr ----------------------------------------------------------------------------------------------------------


def test_a_lokr_says_how_many_layers_were_trained(trained):
    done, output = trained("lokr", "--target-modules", "q_proj")
    assert done.exit_code == 0, done.output
    text, said = says(output)
    adapter = read_adapter(output)
    q_layers = [name for name in adapter.layers if name.endswith(".q_proj")]
    assert 0 < len(q_layers) < len(adapter.layers), "LyCORIS wraps all layers"
    assert said["trained_layers"] == len(q_layers) and said["layers"] == len(adapter.layers)
    assert said["untrained_layers"] == len(adapter.layers) - len(q_layers)
    assert said["targets"] == ["q_proj"]
    rest = len(adapter.layers) - len(q_layers)
    assert f"  Weights:   {len(q_layers)} layers (q_proj), " in text
    assert f"{rest} more layers hold only zeros and change nothing" in text

    page = (Path(__file__).parents[2] / "docs" / "using-your-adapter.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"^  Weights: .*change nothing$", page, flags=re.MULTILINE)
    assert re.search(re.sub(r"\d+(\\\.\d)?", r"[\\d.]+", re.escape(shown)), text), "the page shows another line"

    assert said["facts"]["trained_layers"] == len(q_layers)
    facts = json.loads((output / "final" / "training_config.json").read_text(encoding="utf-8"))
    assert facts["trained_layers"] == len(q_layers) and facts["target_modules"] == ["q_proj"]
    with safe_open(output / "final" / "lokr_weights.safetensors", framework="pt") as weights:
        assert weights.metadata()["sidestep.trained_layers"] == str(len(q_layers))


@pytest.fixture
def by_lycoris(require_kind, tmp_path):
    """A LoKr as LyCORIS makes it, on two layers, one of which gets one optimizer step."""
    require_kind("lokr")

    def make(**settings):
        from lycoris import LycorisNetwork, create_lycoris

        model = torch.nn.Module()
        model.layers = torch.nn.ModuleList([torch.nn.Module()])
        model.layers[0].self_attn = torch.nn.Module()
        for name in ("q_proj", "v_proj"):
            setattr(model.layers[0].self_attn, name, torch.nn.Linear(32, 32))
        LycorisNetwork.apply_preset({"unet_target_name": [], "target_name": []})
        network = create_lycoris(model, 1.0, **{"algo": "lokr", "linear_dim": 2, "linear_alpha": 8} | settings)
        network.apply_to()
        (one,) = [lora for lora in network.loras if lora.lora_name.endswith("q_proj")]
        optimizer = torch.optim.AdamW(one.parameters(), lr=0.01)
        model.layers[0].self_attn.q_proj(torch.ones(1, 32)).square().sum().backward()
        optimizer.step()
        network.save_weights(str(tmp_path / "lokr_weights.safetensors"), None, {"algo": "lokr"})
        return tmp_path

    return make


SETTINGS = {
    "one factor decomposed": {},
    "in full": {"full_matrix": True},
    "both decomposed": {"decompose_both": True, "factor": 8},
    "scalar": {"use_scalar": True},
    "scalar, in full": {"use_scalar": True, "full_matrix": True},
    "rs_lora": {"rs_lora": True},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_whichever_factor_lycoris_begins_with_zeros(by_lycoris, settings):
    adapter = read_adapter(by_lycoris(**settings))
    assert adapter.idle == {"layers.0.self_attn.v_proj"}


def test_a_magnitude_may_change_a_layer_whose_factors_are_zero(by_lycoris):
    """With weight decomposition the weight is scaled by the magnitude, too; from the file alone nobody can tell."""
    assert read_adapter(by_lycoris(dora_wd=True)).idle == frozenset()


ZEROS = {
    "zeros": (torch.zeros(4, 4), True),
    "negative zeros": (-torch.zeros(4, 4), True),
    "bf16 zeros of both signs": (
        torch.zeros(4, 4, dtype=torch.bfloat16) * torch.tensor([1, -1, 1, -1.0]).bfloat16(),
        True,
    ),
    "fp16": (-torch.zeros(4, 4, dtype=torch.float16), True),
    "fp64": (-torch.zeros(4, 4, dtype=torch.float64), True),
    "integers": (torch.zeros(4, 4, dtype=torch.int8), True),
    "an integer with its sign bit alone": (torch.full((4, 4), -128, dtype=torch.int8), False),
    "the smallest number of fp32": (torch.full((4, 4), 2.0**-149), False),
    "the byte of a sign elsewhere": (torch.full((4, 4), 128 * 2.0**-149), False),
    "the smallest normal number of bf16": (torch.full((4, 4), 2.0**-126, dtype=torch.bfloat16), False),
    "one value at the end": (torch.cat([torch.zeros(2_000_000), torch.ones(1)]).reshape(1, -1), False),
    "zeros for long": (torch.zeros(1, 2_000_001), True),
    "not a number": (torch.full((4, 4), torch.nan), False),
    "nothing": (torch.zeros(0, 4), False),
}


@pytest.mark.parametrize(("tensor", "idle"), ZEROS.values(), ids=ZEROS)
def test_only_values_that_are_exactly_zero_count(tensor, idle, tmp_path):
    folder = save_lokr(tmp_path, {"layers.0.self_attn.q_proj": {"lokr_w1": torch.ones(2, 2), "lokr_w2": tensor}})
    assert (read_adapter(folder).idle == {"layers.0.self_attn.q_proj"}) is idle


# -- a LoRA ----------------------------------------------------------------------------------------------------------


def test_an_untrained_lora_is_noted(tmp_path):
    folder = lora(tmp_path, "base_model.model.{}.lora_{}.weight", config=PEFT)
    assert says(folder)[1]["untrained_layers"] == 0
    tensors = load_file(folder / "adapter_model.safetensors")
    zeroed = {key: torch.zeros_like(tensor) if "lora_B" in key else tensor for key, tensor in tensors.items()}
    save_file(zeroed, folder / "adapter_model.safetensors")
    code, lines, said = inspect(folder)
    assert code == 0 and (said["trained_layers"], said["untrained_layers"], said["layers"]) == (0, 4, 4)
    (note,) = said["notes"]
    assert note.startswith("This adapter changes nothing: all its layers hold zeros")
    assert f"  Note:      {note}" in lines
    assert "  Weights:   4 layers (q_proj, v_proj), BF16, 512 B" not in lines  # the size is in kB
    assert said["targets"] == ["q_proj", "v_proj"]


def test_a_trained_lora_says_that_all_its_layers_were_trained(trained):
    done, output = trained("lora")
    assert done.exit_code == 0, done.output
    _, said = says(output)
    assert said["facts"]["trained_layers"] == said["trained_layers"] == said["layers"] and said["notes"] == []


# -- names that match nothing ----------------------------------------------------------------------------------------

LAYERS = [
    *(f"layers.{n}.{part}.{name}" for n in range(2) for part in ("self_attn", "cross_attn") for name in ATTENTION),
    *(f"layers.{n}.mlp.{name}" for n in range(2) for name in ("gate_proj", "up_proj", "down_proj")),
    *("proj_in.1", "condition_embedder", "time_embed.linear_1"),
]


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("lora", ["q_proj", "v_proj"]),
        ("lora", ["self_attn.q_proj"]),
        ("lora", ["layers.1.mlp.up_proj", "condition_embedder", "proj_in.1"]),
        ("lokr", ["q_proj"]),
        ("lokr", ["Q_Proj"]),
        ("lokr", ["self_attn", "mlp"]),
    ],
)
def test_names_of_layers_are_accepted(kind, names):
    check_targets(LAYERS, names, kind)


@pytest.mark.parametrize(
    ("kind", "names", "wrong"),
    [
        ("lora", ["q_prj"], "q_prj"),
        ("lora", ["q_proj", "to_k"], "to_k"),
        ("lora", ["Q_proj"], "Q_proj"),
        ("lora", ["self_attn"], "self_attn"),
        ("lora", ["proj"], "proj"),
        ("lora", [".*q_proj"], r"\.\*q_proj"),
        ("lokr", ["to_q"], "to_q"),
        ("lokr", ["q_proj", "k_prj"], "k_prj"),
        ("lokr", ["self_attn.q_proj"], "self_attn.q_proj"),
    ],
)
def test_a_name_that_matches_no_layer_is_refused_with_the_names_that_exist(kind, names, wrong):
    with pytest.raises(Refusal, match=f"--target-modules.*{wrong}.*q_proj.*condition_embedder"):
        check_targets(LAYERS, names, kind)


def test_control_characters_in_a_name_are_escaped():
    with pytest.raises(Refusal, match=r"\\x1b"):
        check_targets(LAYERS, ["\x1b[31mq"], "lora")


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_training_is_refused_before_the_model_is_loaded(kind, trained):
    done, output = trained(kind, "--target-modules", "q_proj,to_k")
    assert done.exit_code == 2, done.output
    assert "'to_k'" in done.stderr and "v_proj" in done.stderr and "condition_embedder" in done.stderr
    assert "Loading" not in done.stdout and not output.exists()
