"""``export --to universal``: every program plays it at the strength that it was trained with.

PEFT and diffusers are run; the others' rules are in ``readers.py``.
"""

import copy
import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from sidestep_plugin.adapters.layers import read_adapter
from sidestep_plugin.cli import cli

from .comfyui_rules import ATTENTION, MLP, a_decoder, make_random, weights_of
from .readers import READERS, hot_step_trigger
from .test_comfyui import NAMINGS
from .test_diffusers import ace_step_names, in_diffusers, play, transformer  # noqa: F401


@pytest.fixture
def by_peft(tmp_path):
    """Make a LoRA with PEFT, every tensor of it random. Returns its folder and what it adds to each layer's weight."""
    from peft import LoraConfig, get_peft_model

    def make(model=None, dtype=None, **settings):
        settings = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION} | settings
        whole = get_peft_model(a_decoder() if model is None else copy.deepcopy(model), LoraConfig(**settings))
        make_random((name, parameter) for name, parameter in whole.named_parameters() if "lora_" in name)
        folder = tmp_path / "trained"
        whole.save_pretrained(folder)
        if dtype is not None:
            file = folder / "adapter_model.safetensors"
            tensors = {key: tensor.to(dtype) for key, tensor in load_file(file).items()}
            file.unlink()
            save_file(tensors, file)
        return folder, by_peft_itself(folder, model)

    return make


def by_peft_itself(folder, model=None):
    """What PEFT adds to each layer's weight."""
    from peft import PeftModel

    base = copy.deepcopy(model) if model is not None else a_decoder()
    names = [name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)]
    before = {name: base.get_submodule(name).weight.detach().clone() for name in names}
    merged = PeftModel.from_pretrained(base, folder).merge_and_unload()
    changes = {name: merged.get_submodule(name).weight.detach() - before[name] for name in names}
    return {name: change for name, change in changes.items() if change.any()}


def export(adapter, *words):
    return CliRunner().invoke(
        cli, ["export", str(adapter), "--to", "universal", *map(str, words)], catch_exceptions=False
    )


def exported(adapter, *words):
    done = export(adapter, *words)
    assert done.exit_code == 0, done.output
    return done.output


def strength_of(found, trained):
    """By how much the changes that a program makes are those that were trained: 1 if they are the same."""
    together = sum(float((found[name].double() * trained[name].double()).sum()) for name in trained if name in found)
    return together / sum(float(change.double().square().sum()) for change in trained.values())


FILES = {
    "rank 4, alpha 4": {"lora_alpha": 4},
    "rank 4, alpha 8": {},
    "rank 4, alpha 2": {"lora_alpha": 2},
    "rank 8, alpha 16": {"r": 8, "lora_alpha": 16},
    "rank 64, alpha 128": {"r": 64, "lora_alpha": 128},
    "rank 6, alpha 5": {"r": 6, "lora_alpha": 5},
    "rsLoRA": {"use_rslora": True},
    "patterns of alpha": {"alpha_pattern": {"q_proj": 3, "layers.1.self_attn.v_proj": 50}},
    "patterns of ranks": {"rank_pattern": {"q_proj": 2, "v_proj": 7}},
    "attention and MLP": {"target_modules": [*ATTENTION, *MLP], "alpha_pattern": {"up_proj": 1}},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("settings", FILES.values(), ids=FILES)
def test_every_program_plays_it_at_full_strength(by_peft, tmp_path, settings, dtype):
    folder, trained = by_peft(dtype=dtype, **settings)
    before = weights_of(a_decoder())
    exported(folder, "--output", tmp_path / "universal")
    exported(folder, "--output", tmp_path / "alone.safetensors")
    for place in (tmp_path / "universal", tmp_path / "alone.safetensors"):
        for name, read in READERS.items():
            found = read(place, before)
            rounds = 0.05 if name in ("acestep.cpp", "HOT-Step") or dtype is torch.bfloat16 else 1e-5
            for layer, change in trained.items():
                torch.testing.assert_close(found[layer], change, rtol=rounds, atol=rounds, msg=lambda t, n=name: n + t)
            assert abs(strength_of(found, trained) - 1.0) < (1e-3 if rounds == 0.05 else 1e-5), name
    again = by_peft_itself(tmp_path / "universal")
    assert abs(strength_of(again, trained) - 1.0) < 1e-5 and again.keys() == trained.keys()


WRONG = {
    # What is played without a copy: the strength found against the one that was trained.
    "ComfyUI": 0.5,
    "acestep.cpp": 1.0,
    "HOT-Step": 1.0,
    "Wan2GP": 0.5,
    "DEMON": 0.5,
}


def test_without_it_most_programs_play_half_of_it(by_peft, tmp_path):
    folder, trained = by_peft()
    before = weights_of(a_decoder())
    found = {name: round(strength_of(read(folder, before), trained), 2) for name, read in READERS.items()}
    assert found == WRONG


def test_diffusers_plays_it_at_full_strength(by_peft, transformer, play, tmp_path):  # noqa: F811
    model = ace_step_names(transformer)
    folder, trained = by_peft(model, rank_pattern={"v_proj": 7}, alpha_pattern={"q_proj": 3})
    (tmp_path / "loras").mkdir()
    exported(folder, "--output", tmp_path / "loras" / "jazz.safetensors")
    loaded = play(transformer, tmp_path / "loras", "jazz.safetensors")
    for layer, change in trained.items():
        module = loaded.get_submodule(in_diffusers(layer))
        added = module.get_delta_weight(module.active_adapters[0]).detach()
        torch.testing.assert_close(added, change, rtol=1e-4, atol=1e-5)


def test_bf16_stays_bf16_where_nothing_is_rounded(by_peft, tmp_path):
    folder, _ = by_peft(dtype=torch.bfloat16)
    said = exported(folder, "--output", tmp_path / "twice.safetensors")
    assert {t.dtype for t in load_file(tmp_path / "twice.safetensors").values()} == {
        torch.bfloat16
    } and "fp32" not in said
    shutil.rmtree(folder)
    folder, _ = by_peft(dtype=torch.bfloat16, lora_alpha=5)
    said = exported(folder, "--output", tmp_path / "other.safetensors")
    assert {t.dtype for t in load_file(tmp_path / "other.safetensors").values()} == {torch.float32}
    assert "Its tensors are fp32" in said


def test_ranks_are_filled_up_so_that_one_alpha_is_right_for_all(by_peft, tmp_path):
    folder, _ = by_peft(rank_pattern={"q_proj": 2, "v_proj": 7})
    exported(folder, "--output", tmp_path / "universal")
    config = json.loads((tmp_path / "universal" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (7, 7, {}, {})
    assert set(read_adapter(tmp_path / "universal").strengths) == {1.0}
    assert set(read_adapter(tmp_path / "universal").ranks) == {7}


@pytest.mark.parametrize("strength", [0.8, 2.0, -1.0])
def test_a_strength_can_be_written_into_it(by_peft, tmp_path, strength):
    folder, trained = by_peft()
    before = weights_of(a_decoder())
    exported(folder, "--strength", strength, "--output", tmp_path / "copy.safetensors")
    for name, read in READERS.items():
        assert abs(strength_of(read(tmp_path / "copy.safetensors", before), trained) - strength) < 1e-3, name
    words = [
        "export",
        str(folder),
        "--to",
        "comfyui",
        "--strength",
        str(strength),
        "--output",
        str(tmp_path / "c.safetensors"),
    ]
    assert CliRunner().invoke(cli, words).exit_code == 0
    assert abs(strength_of(READERS["ComfyUI"](tmp_path / "c.safetensors", before), trained) - strength) < 1e-5
    said = CliRunner().invoke(cli, ["inspect", "--json", str(tmp_path / "copy.safetensors")]).stdout
    assert json.loads(said)["facts"]["copy_strength"] == strength


@pytest.mark.parametrize(("naming", "header", "arguments"), NAMINGS.values(), ids=NAMINGS)
def test_a_lora_in_another_programs_names(by_peft, tmp_path, naming, header, arguments):
    folder, trained = by_peft(target_modules=[*ATTENTION, *MLP])
    file = tmp_path / "downloads" / "jazz.safetensors"
    file.parent.mkdir()
    save_file(naming(load_file(folder / "adapter_model.safetensors")), file, header)
    exported(file, *arguments)
    for name, read in READERS.items():
        assert abs(strength_of(read(file.parent / "universal", weights_of(a_decoder())), trained) - 1.0) < 1e-3, name


def test_it_carries_the_trigger_and_all_facts(train, tmp_path):
    folder = train("base", max_epochs=1, options={"trigger": "a jazz band", "title": "Jazz"}).output / "final"
    said = exported(folder, "--output", tmp_path / "jazz.safetensors")
    assert "Generate with shift 1.0, 50 steps, CFG on." in said
    assert hot_step_trigger(tmp_path / "jazz.safetensors") == ("a jazz band", "prepend")
    found = json.loads(CliRunner().invoke(cli, ["inspect", "--json", str(tmp_path / "jazz.safetensors")]).stdout)
    assert found["intact"] and found["facts"]["title"] == "Jazz" and found["generate"]["guess"] is False
    assert (found["facts"]["rank"], found["facts"]["alpha"], found["strengths"]) == (4, 4, {"1.0": 16})
    assert not [note for note in found["notes"] if "strength" in note] and found["problems"] == []
    exported(folder)
    assert sorted(file.name for file in (folder / folder.parent.name).iterdir()) == [
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "training_config.json"),
    ]


def refused(adapter, *words, says):
    done = export(adapter, *words)
    assert done.exit_code == 2, done.output
    assert says in done.stderr, done.stderr


def test_what_cannot_play_everywhere_is_refused_or_told(by_peft, train, require_kind, tmp_path):
    folder, _ = by_peft(use_dora=True)
    refused(folder, "--output", tmp_path / "x.safetensors", says="is a DoRA")
    shutil.rmtree(folder)
    folder, _ = by_peft()
    refused(folder, "--output", folder, says="There is an adapter in")
    refused(folder, "--output", folder / "copy.safetensors", says="has an adapter_config.json, from which acestep.cpp")
    refused(folder, "--strength", 0, says="--strength 0 would make a copy that changes nothing")
    exported(folder, "--output", tmp_path / "copy.safetensors")
    refused(folder, "--output", tmp_path / "copy.safetensors", says="already exists")
    exported(folder, "--output", tmp_path / "copy.safetensors", "--overwrite")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa"}), encoding="utf-8")
    refused(folder, "--output", tmp_path / "x.safetensors", says="init_lora_weights = pissa")
    shutil.rmtree(folder)
    folder, _ = by_peft(target_modules=["proj_in.1", "up_proj"])
    said = exported(folder, "--output", tmp_path / "y.safetensors")
    assert "Note: acestep.cpp and DEMON leave out 1 convolution: proj_in.1." in said
    assert "Note: diffusers does not recognise it" in said
    assert not (tmp_path / "x.safetensors").exists()
    require_kind("lokr")
    refused(train("base", "lokr", max_epochs=1).output, says="is a LoKr, which diffusers and DEMON do not play")


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("jazz/final/adapter", "jazz"),
        ("My jazz, v1.5/final/adapter", "My_jazz_v1_5"),
        ("jazz/checkpoints/epoch_10_loss_0.7312/adapter", "jazz-epoch_10"),
        ("jazz/checkpoints/best/adapter", "jazz-best"),
        ("downloads", "universal"),
    ],
)
def test_a_copy_has_the_name_of_its_training_without_dots(tmp_path, folder, name):
    """ACE-Step's app calls an adapter by its folder and takes a name only once; PEFT takes no name with a dot."""
    from sidestep_plugin.cli.export import _name_of

    assert _name_of(tmp_path / folder) == name
