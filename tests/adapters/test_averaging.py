"""Averages: the mean of what adapters do to a model, to float rounding, and what is told of the rest.

PEFT and LyCORIS make the adapters and play the results; what they add to a layer's weight is compared.
"""

import json
import os
import re
import shutil

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from sidestep_plugin.adapters.averaging import average
from sidestep_plugin.adapters.kinds.lora import LORA
from sidestep_plugin.adapters.layers import read_adapter
from sidestep_plugin.cli import cli

from .comfyui_rules import ATTENTION, MLP, a_decoder, weights_of
from .test_comfyui import NAMINGS


@pytest.fixture
def by_peft(tmp_path):
    """Make a LoRA with PEFT, every tensor of it random. Returns its folder and what it adds to each layer's weight."""
    from peft import LoraConfig, get_peft_model

    def make(name, seed, dtype=None, **settings):
        settings = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION} | settings
        model = get_peft_model(a_decoder(), LoraConfig(**settings))
        torch.manual_seed(seed)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data.normal_(std=0.3)
        model.save_pretrained(tmp_path / name)
        if dtype is not None:
            file = tmp_path / name / "adapter_model.safetensors"
            tensors = {key: tensor.to(dtype) for key, tensor in load_file(file).items()}
            file.unlink()
            save_file(tensors, file)
        return tmp_path / name, changes_by_peft(tmp_path / name)

    return make


def changes_by_peft(folder):
    """What PEFT adds to each layer's weight."""
    from peft import PeftModel

    before = weights_of(a_decoder())
    after = weights_of(PeftModel.from_pretrained(a_decoder(), folder).merge_and_unload())
    return {name: after[name] - before[name] for name in before}


def run(*words):
    return CliRunner().invoke(cli, ["average", *map(str, words)], catch_exceptions=False)


def averaged(folder, *words):
    done = run(*words, "--output", folder)
    assert done.exit_code == 0, done.output
    return changes_by_peft(folder)


def check_mean(found, *changes, weights=None, tolerance=2e-6):
    shares = [1.0 / len(changes)] * len(changes) if weights is None else [w / sum(weights) for w in weights]
    for name in found:
        mean = sum(share * change[name] for share, change in zip(shares, changes, strict=True))
        torch.testing.assert_close(
            found[name], mean, rtol=1e-4, atol=tolerance, msg=lambda text, name=name: name + text
        )


LORAS = {
    "plain": ({}, {}),
    "ranks": ({"r": 2, "lora_alpha": 6}, {"r": 6, "lora_alpha": 3}),
    "alphas": ({"lora_alpha": 1}, {"alpha_pattern": {"q_proj": 3, "layers.1.self_attn.v_proj": 5}}),
    "patterns of ranks": ({"rank_pattern": {"q_proj": 2, "v_proj": 7}}, {"rank_pattern": {"o_proj": 1}}),
    "rsLoRA": ({"use_rslora": True}, {}),
    "other layers": ({"target_modules": ["q_proj", "up_proj"]}, {"target_modules": ["q_proj", "v_proj"]}),
    "MLP": ({"target_modules": MLP}, {"target_modules": [*ATTENTION, *MLP]}),
}


@pytest.mark.parametrize(("one", "other"), LORAS.values(), ids=LORAS)
def test_an_average_is_the_mean_of_what_both_add(by_peft, tmp_path, one, other):
    (a, change_a), (b, change_b) = by_peft("a", 1, **one), by_peft("b", 2, **other)
    ranks = sum(max(read_adapter(folder).ranks) for folder in (a, b))
    found = averaged(tmp_path / "mean", a, b, "--to-rank", ranks)
    check_mean(found, change_a, change_b)
    check_mean(
        averaged(tmp_path / "2", a, b, "--to-rank", ranks, "--weights", "3,1"), change_a, change_b, weights=[3, 1]
    )
    text = json.loads((tmp_path / "mean" / "training_config.json").read_text(encoding="utf-8"))
    assert text["average_energy"] == 1.0


def test_three_adapters(by_peft, tmp_path):
    made = [by_peft(f"{seed}", seed) for seed in range(3)]
    check_mean(averaged(tmp_path / "mean", *(folder for folder, _ in made), "--to-rank", 12), *(c for _, c in made))


def test_the_average_of_one_adapter_is_that_adapter(by_peft, tmp_path):
    folder, change = by_peft("a", 1, rank_pattern={"q_proj": 3}, alpha_pattern={"v_proj": 5})
    check_mean(averaged(tmp_path / "one", folder, folder), change)
    check_mean(averaged(tmp_path / "same rank", folder, "--to-rank", 4), change)


def test_an_adapter_and_its_negative_are_nothing(by_peft, tmp_path):
    folder, _ = by_peft("a", 1)
    shutil.copytree(folder, tmp_path / "negative")
    file = tmp_path / "negative" / "adapter_model.safetensors"
    save_file(
        {key: -tensor if "lora_B" in key else tensor for key, tensor in load_file(folder / file.name).items()}, file
    )
    found = averaged(tmp_path / "nothing", folder, tmp_path / "negative")
    assert all(bool((change == 0).all()) for change in found.values())
    assert len(read_adapter(tmp_path / "nothing").untrained) == 16


def test_the_mean_of_bf16_is_bf16(by_peft, tmp_path):
    (a, change_a), (b, change_b) = by_peft("a", 1, torch.bfloat16), by_peft("b", 2, torch.bfloat16)
    check_mean(averaged(tmp_path / "mean", a, b, "--to-rank", 8), change_a, change_b, tolerance=0.03)
    assert {str(t.dtype) for t in load_file(tmp_path / "mean" / "adapter_model.safetensors").values()} == {
        "torch.bfloat16"
    }
    c, _ = by_peft("c", 3)
    averaged(tmp_path / "both", a, c)
    assert {str(t.dtype) for t in load_file(tmp_path / "both" / "adapter_model.safetensors").values()} == {
        "torch.float32"
    }


@pytest.mark.parametrize(("naming", "header", "_"), NAMINGS.values(), ids=NAMINGS)
def test_adapters_in_another_programs_names(by_peft, tmp_path, naming, header, _):
    folder, change = by_peft("a", 1, target_modules=[*ATTENTION, *MLP])
    other, other_change = by_peft("b", 2, target_modules=[*ATTENTION, *MLP])
    file = tmp_path / "downloads" / "jazz.safetensors"
    file.parent.mkdir()
    tensors = naming(load_file(folder / "adapter_model.safetensors"))
    save_file(tensors, file, header)
    if header is None and not any(key.endswith(".alpha") for key in tensors):
        assert "The alpha of" in run(file, other, "--output", tmp_path / "mean").stderr
        return
    check_mean(averaged(tmp_path / "mean", file, other, "--to-rank", 8), change, other_change)


def test_what_is_cut_is_told_as_a_share_of_the_energy(by_peft, tmp_path):
    (a, change_a), (b, change_b) = by_peft("a", 1), by_peft("b", 2)
    done = average([read_adapter(a), read_adapter(b)])
    mean = {name: (change_a[name] + change_b[name]).double() / 2 for name in change_a}
    kept = {name: LORA.change(as_layer(layer), layer.tensors).double() for name, layer in done.layers.items()}
    exact = sum(float(mean[name].square().sum()) for name in kept)
    lost = sum(float((mean[name] - kept[name]).square().sum()) for name in kept)
    assert 0.5 < done.energy < 0.99 and abs(done.energy - (1 - lost / exact)) < 1e-5
    shares = [1 - float((mean[name] - kept[name]).square().sum() / mean[name].square().sum()) for name in kept]
    assert abs(done.lowest - min(shares)) < 1e-5 and done.ranks == {4}
    best = [torch.linalg.svdvals(mean[name])[4:].square().sum() for name in kept]
    assert abs(sum(map(float, best)) - lost) < 1e-4 * exact, "no other cut to this rank loses less"
    text = run(a, b, "--output", tmp_path / "mean").output
    assert f"Kept at rank 4: {100 * done.energy:.2f} % of the energy" in text and "A higher --to-rank" in text


def as_layer(mean):
    from sidestep_plugin.adapters.layers import Layer

    return Layer("x", rank=mean.rank, alpha=mean.alpha)


def test_resizing_keeps_the_largest_part(by_peft, tmp_path):
    folder, change = by_peft("a", 1, r=8)
    found = averaged(tmp_path / "small", folder, "--to-rank", 3)
    for name, full in change.items():
        if not full.any():
            continue
        u, values, v = torch.linalg.svd(full)
        torch.testing.assert_close(found[name], u[:, :3] * values[:3] @ v[:3], rtol=1e-3, atol=1e-4)
    refused(tmp_path / "x", folder, "--to-rank", 9, says="--to-rank 9 is higher than what there is: 8")


# -- LoKr ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def lokrs(require_kind, tmp_path):
    """Two LoKr of one training, and what LyCORIS adds with each: the second is a little further than the first."""
    require_kind("lokr")

    def make(apart=0.02, **settings):
        from lycoris import LycorisNetwork, create_lycoris

        settings = {"algo": "lokr", "linear_dim": 2, "linear_alpha": 8} | settings
        made = []
        for name in ("a", "b"):
            LycorisNetwork.apply_preset({"unet_target_name": [], "target_name": []})
            network = create_lycoris(a_decoder(), 1.0, **settings)
            network.apply_to()
            torch.manual_seed(5)
            for parameter in network.parameters():
                parameter.data.normal_(std=0.3)
            torch.manual_seed(6)
            for parameter in network.parameters():
                parameter.data += (apart if name == "b" else 0.0) * torch.randn_like(parameter)
            (tmp_path / name).mkdir()
            network.save_weights(str(tmp_path / name / "lokr_weights.safetensors"), None, {"lokr_config": "{}"})
            made.append((tmp_path / name, changes_of(network)))
        return made

    return make


def changes_of(network):
    names = {f"lycoris_{name.replace('.', '_')}": name for name in weights_of(a_decoder())}
    return {names[lora.lora_name]: lora.get_weight(lora.shape).detach() for lora in network.loras}


def played_by_lycoris(folder):
    from lycoris import create_lycoris_from_weights

    network, _ = create_lycoris_from_weights(1.0, str(folder / "lokr_weights.safetensors"), a_decoder())
    return changes_of(network)


WITHOUT_CONVOLUTION = {"full_matrix": True}
LOKRS = {
    "one factor decomposed": {},
    "full matrices": {"linear_dim": 64, "linear_alpha": 128},
    "both decomposed": {"decompose_both": True, "factor": 8},
}


@pytest.mark.parametrize("settings", LOKRS.values(), ids=LOKRS)
def test_a_mean_of_lokrs_is_near_the_mean_of_what_they_add(lokrs, tmp_path, settings):
    (a, change_a), (b, change_b) = lokrs(**settings)
    for folder in (a, b):
        without_convolutions(folder)
    done = run(a, b, "--output", tmp_path / "mean")
    assert done.exit_code == 0, done.output
    found = played_by_lycoris(tmp_path / "mean")
    exact = {name: (change_a[name] + change_b[name]) / 2 for name in found}
    lost = sum(float((exact[name] - found[name]).square().sum()) for name in found)
    all_of_it = sum(float(change.square().sum()) for change in exact.values())
    facts = json.loads((tmp_path / "mean" / "training_config.json").read_text(encoding="utf-8"))
    assert facts["average_energy"] > 0.99 and abs(1 - lost / all_of_it - facts["average_energy"]) < 1e-4
    names = {key: tuple(tensor.shape) for key, tensor in load_file(a / "lokr_weights.safetensors").items()}
    mean = {key: tuple(t.shape) for key, t in load_file(tmp_path / "mean" / "lokr_weights.safetensors").items()}
    assert names == mean, "the same settings load it"


def without_convolutions(folder):
    file = folder / "lokr_weights.safetensors"
    tensors = {key: tensor for key, tensor in load_file(file).items() if "proj_in" not in key}
    file.unlink()
    save_file(tensors, file)


def test_the_mean_of_one_lokr_twice_is_that_lokr(lokrs, tmp_path):
    (a, change), _ = lokrs()
    without_convolutions(a)
    assert run(a, a, "--output", tmp_path / "mean").exit_code == 0
    found = played_by_lycoris(tmp_path / "mean")
    for name in found:
        torch.testing.assert_close(found[name], change[name], rtol=1e-4, atol=1e-5)


def test_layers_that_none_has_trained_stay_as_they_are(lokrs, tmp_path):
    """A convolution among them, as in files of upstream's."""
    made = lokrs()
    for folder, _ in made:
        file = folder / "lokr_weights.safetensors"
        tensors = load_file(file)
        zero = {k: torch.zeros_like(t) if "proj_in" in k and "lokr_w2_b" in k else t for k, t in tensors.items()}
        file.unlink()
        save_file(zero, file)
    done = run(*(folder for folder, _ in made), "--output", tmp_path / "mean")
    assert done.exit_code == 0, done.output
    before, after = (load_file(folder / "lokr_weights.safetensors") for folder in (made[0][0], tmp_path / "mean"))
    assert all(torch.equal(before[key], after[key]) for key in before if "proj_in" in key)


# -- what cannot be averaged -----------------------------------------------------------------------------------------


def refused(output, *words, says):
    done = run(*words, "--output", output)
    assert done.exit_code == 2, done.output
    assert says in done.stderr, done.stderr
    assert not output.exists()


def test_what_cannot_be_averaged_is_refused_by_name(by_peft, lokrs, tmp_path):
    a, _ = by_peft("lora", 1)
    dora, _ = by_peft("dora", 2, use_dora=True)
    (lokr, _), _ = lokrs(full_matrix=True)
    narrow = tmp_path / "narrow"
    shutil.copytree(a, narrow)
    tensors = load_file(narrow / "adapter_model.safetensors")
    save_file(
        {k: t[:, :8].contiguous() if "lora_A" in k else t for k, t in tensors.items()},
        narrow / "adapter_model.safetensors",
    )
    nan = tmp_path / "nan"
    shutil.copytree(a, nan)
    save_file({key: tensor / 0 * 0 for key, tensor in tensors.items()}, nan / "adapter_model.safetensors")
    out = tmp_path / "out"
    refused(out, a, dora, says="has weight decomposition (DoRA) in layers.0.cross_attn.k_proj")
    refused(out, a, lokr, says="There are LoRA and LoKr among these adapters")
    refused(out, a, narrow, says="have other sizes in layers.0.cross_attn.k_proj: (16, 8) and (16, 32)")
    refused(out, a, nan, says="nan/adapter_model.safetensors holds NaN or infinity")
    refused(out, lokr, lokr, says="cannot be averaged: the tensors of proj_in.1 are not two matrices")
    without_convolutions(lokr)
    refused(out, lokr, lokr, "--to-rank", 2, says="--to-rank changes the rank of a LoRA")
    refused(out, a, says="Nothing to do: this is one adapter")
    refused(out, a, a, "--weights", "1", says="expected 2 positive numbers")
    refused(out, a, a, "--weights", "1,nan", says="expected 2 positive numbers")
    refused(out, a, tmp_path / "nowhere", says="No adapter at")


def test_lokrs_with_other_factors_are_refused(lokrs, require_kind, tmp_path):
    (a, _), _ = lokrs(full_matrix=True)
    for folder in (a, shutil.copytree(a, tmp_path / "c")):
        without_convolutions(folder)
    file = tmp_path / "c" / "lokr_weights.safetensors"
    tensors = load_file(file)
    name = "lycoris_layers_0_self_attn_q_proj"
    tensors[f"{name}.lokr_w1"], tensors[f"{name}.lokr_w2"] = torch.ones(2, 2), torch.ones(16, 16)
    file.unlink()
    save_file(tensors, file)
    refused(tmp_path / "out", a, tmp_path / "c", says="in layers.0.self_attn.q_proj: ((2, 2), (16, 16)) and")


# -- from a training ---------------------------------------------------------------------------------------------------


@pytest.fixture
def training(train):
    return train("base", max_epochs=4, options={"title": "Jazz"}).output


def test_the_last_checkpoints_of_a_training(training, load, tmp_path):
    from peft import PeftModel

    output = tmp_path / "mean"
    done = run(training, "--last", 3, "--output", output, "--to-rank", 12)
    assert done.exit_code == 0 and "Mean of 3: epoch 2, epoch 3, epoch 4\n" in done.output, done.output
    facts = json.loads((output / "training_config.json").read_text(encoding="utf-8"))
    assert facts["average_of"] == "epoch 2, epoch 3, epoch 4" and facts["title"] == "Jazz"
    assert (facts["rank"], facts["alpha"]) == (12, 12) and "epoch" not in facts and facts["model_variant"] == "base"
    assert 'base_model_name_or_path": null' in (output / "adapter_config.json").read_text(encoding="utf-8")
    folders = [next(training.glob(f"checkpoints/epoch_{n}*")) / "adapter" for n in (2, 3, 4)]
    before = weights_of(load("base").model.decoder)

    def merged(folder):
        return weights_of(PeftModel.from_pretrained(load("base").model.decoder, folder).merge_and_unload())

    mean = [merged(folder) for folder in folders]
    found = merged(output)
    for name in before:
        torch.testing.assert_close(found[name], sum(w[name] for w in mean) / 3, rtol=0.0, atol=1e-6)
    told = json.loads((folders[-1] / "training_config.json").read_text(encoding="utf-8")) | {"average_steps": 7}
    (folders[-1] / "training_config.json").write_text(json.dumps(told), encoding="utf-8")
    assert run(training, "--last", 2, "--output", tmp_path / "again").exit_code == 0
    again = json.loads((tmp_path / "again" / "training_config.json").read_text(encoding="utf-8"))
    assert "average_steps" not in again, "it was true of one of them"
    said = CliRunner().invoke(cli, ["inspect", str(output)]).output
    assert "  Mean of:   epoch 2, epoch 3, epoch 4\n" in said and "unchanged since saving" in said
    assert run(training, "--last", 2, "--output", output).exit_code == 2
    assert run(training, "--last", 2, "--output", output, "--overwrite").exit_code == 0


def test_epochs_from_and_to(training, tmp_path):
    done = run(training, "--epochs", "1-2", "--output", tmp_path / "mean", "--weights", "1,3")
    assert "Mean of 2: epoch 1 (25 %), epoch 2 (75 %)" in done.output
    for words, says in (
        (("--epochs", "7-9"), "has checkpoints of 4 epochs (1, 2, 3, 4)"),
        (("--epochs", "2"), "expected two epochs, such as 300-500"),
        (("--epochs", "3-2"), "expected two epochs"),
        (("--last", 5), "--last 5: "),
        (("--last", 1, "--epochs", "1-2"), "Leave one of them out"),
        ((training, "--last", 2), "Name one --output-dir"),
    ):
        refused(tmp_path / "out", training, *words, says=says)


def test_the_best_of_several_means_is_chosen_on_songs(training, checkout, tmp_path):
    where = ["--acestep-root", checkout.root, "--checkpoint-dir", checkout.checkpoints, "--device", "cpu"]
    songs = ["--dataset-dir", checkout.tensors, "--validate", 1, *where]
    output = tmp_path / "mean"
    # The newest checkpoint of such a short training is the best one: made worse, so that there is something to choose.
    (file,) = training.glob("final/adapter/adapter_model.safetensors")
    for newest in (file, *training.glob("checkpoints/epoch_4*/adapter/adapter_model.safetensors")):
        tensors = {name: -tensor if "lora_B" in name else tensor for name, tensor in load_file(newest).items()}
        newest.unlink()
        save_file(tensors, newest)
    done = run(training, "--best-of", "2,3,4", "--output", output, *songs)
    assert done.exit_code == 0, done.output
    changes = re.findall(r"^  (the newest checkpoint|mean of the last \d) +([+-][\d.]+) %(  <-)?$", done.output, re.M)
    assert [name for name, *_ in changes] == ["the newest checkpoint", *(f"mean of the last {n}" for n in (2, 3, 4))]
    best = min(range(4), key=lambda place: float(changes[place][1]))
    assert [bool(mark) for *_, mark in changes] == [place == best for place in range(4)] and best > 0
    assert "It was chosen on this song: on others it gains less.\n" in done.output
    facts = json.loads((output / "training_config.json").read_text(encoding="utf-8"))
    assert facts["average_best_of"] == "2,3,4"
    assert run(training, "--last", best + 1, "--output", tmp_path / "same").exit_code == 0
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (output, tmp_path / "same"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_newest_checkpoint_may_be_the_best(training, checkout, tmp_path):
    where = ["--acestep-root", checkout.root, "--checkpoint-dir", checkout.checkpoints, "--device", "cpu"]
    songs = ["--dataset-dir", checkout.tensors, *where]
    done = run(training, "--best-of", "2", "--output", tmp_path / "mean", *songs)
    assert done.exit_code == 0 and not (tmp_path / "mean").exists()
    assert done.output.endswith("Nothing was saved: the newest checkpoint alone has the lowest loss.\n")
    for words, says in (
        (("--best-of", "2"), "Name them: --dataset-dir DIR"),
        (("--best-of", "2,x", *songs), "expected whole numbers from 2 on, such as 2,4,8"),
        (("--best-of", "1,2", *songs), "expected whole numbers from 2 on"),
        (("--best-of", "9", *songs), "--last 9: "),
        (("--best-of", "2", "--last", 2, *songs), "Leave --last out"),
        (("--last", 2, *songs), "Say among what: --best-of"),
    ):
        refused(tmp_path / "out", training, *words, says=says)


def test_nothing_of_the_adapters_is_changed(training, tmp_path):
    def contents():
        return {file: file.read_bytes() for file in training.rglob("*") if file.is_file()}

    before = contents()
    assert run(training, "--last", 2, "--output", tmp_path / "mean").exit_code == 0
    assert contents() == before


@pytest.mark.skipif(os.name == "nt", reason="limits the size of files as a full disk does")
@pytest.mark.parametrize("command", ["average", "universal"])
def test_a_full_disk_is_told_in_one_line(by_peft, tmp_path, command):
    """safetensors has an error of its own for it, which is none of Python's."""
    import resource

    by_peft("one", 1)
    words = {"average": ["average", "--to-rank", "2"], "universal": ["export", "--to", "universal"]}[command]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        done = CliRunner().invoke(cli, [*words, str(tmp_path / "one"), "--output", str(tmp_path / "out")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert done.exit_code == 2 and "File too large" in done.stderr and done.stderr.count("\n") == 1, done.output
    assert not list(tmp_path.glob(".out.*")) and not (tmp_path / "out").exists()
