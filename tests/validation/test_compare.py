"""``acestep-train compare``: adapters of any trainer on the same songs, at the same timesteps, with the same noise."""

from __future__ import annotations

import json
import re
import shlex
import shutil

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from sidestep_plugin.cli import cli


@pytest.fixture
def compare(checkout, trainer, monkeypatch):
    """Run the command on the checkout's songs and return what it printed."""
    monkeypatch.chdir(checkout.tensors.parent)

    def run(*arguments, model="base", dataset=None):
        line = ["compare", *map(str, arguments), "--model", model, "--acestep-root", str(checkout.root)]
        line += ["--checkpoint-dir", str(checkout.checkpoints), "--dataset-dir", str(dataset or checkout.tensors)]
        return CliRunner().invoke(cli, [*line, "--device", "cpu"])

    return run


def side_steps_copy_of(adapter, target):
    """The same adapter as Side-Step saves it: PEFT's two files, and its own facts beside them."""
    shutil.copytree(adapter, target)
    (target / "training_config.json").unlink(missing_ok=True)
    weights = load_file(target / "adapter_model.safetensors")
    save_file(weights, target / "adapter_model.safetensors", metadata={"format": "pt"})
    facts = {"model_variant": "base", "shift": 1.0, "num_inference_steps": 50, "timestep_mu": -0.4, "r": 4, "alpha": 8}
    (target / "sidestep_training_config.json").write_text(json.dumps(facts), encoding="utf-8")


@pytest.mark.slow
def test_adapters_of_four_trainers(train, compare, kinds, tmp_path):
    """Ours and upstream's, LoRA and LoKr, and Side-Step's. A training's own validation gives the same number."""
    pytest.importorskip("matplotlib")
    outputs, expected = {}, {}
    for kind in kinds:
        result = train("base", kind, options={"validate": 2, "validate_every": 1})
        outputs[f"ours {kind}"] = result.output / "final"
        report = json.loads((result.output / "training_report.json").read_text(encoding="utf-8"))["validation"]
        expected[f"ours {kind}"] = report["epochs"][-1]
        outputs[f"upstream {kind}"] = train("base", kind, plugins=None, max_epochs=1).output / "final"
    side_steps_copy_of(outputs["ours lora"] / "adapter", tmp_path / "side-step")
    outputs["Side-Step"] = tmp_path / "side-step"
    done = compare(*outputs.values(), "--validate", 2, "--json", "--plot", tmp_path / "compare.png")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert found["timesteps"] == sorted(found["timesteps"]) and len(found["timesteps"]) == 8
    assert found["weight_without_condition"] == 0.15 and len(found["songs"]) == 2
    by_name = dict(zip(outputs, found["adapters"], strict=True))
    for name, epoch in expected.items():
        assert by_name[name]["loss_by_t"] == pytest.approx(epoch["loss_by_t"], abs=1e-6), "the report has six decimals"
        assert by_name[name]["change"] == pytest.approx(epoch["change"], abs=2e-6)
    ours, theirs = by_name["ours lora"], by_name["Side-Step"]
    assert theirs["written_by"] == "Side-Step" and theirs["loss_by_t"] == ours["loss_by_t"]
    assert {entry["adapter_type"] for entry in found["adapters"]} == set(kinds)
    assert all(entry["change"] < 0.0 for entry in found["adapters"])
    assert by_name["upstream lora"]["loss_by_t_without_condition"] != by_name["upstream lora"]["loss_by_t"]


def lora(folder, *, width=64, layer="layers.0.self_attn.q_proj", value=0.0):
    """A LoRA of rank 1 for one layer."""
    folder.mkdir()
    name = f"base_model.model.{layer}"
    weights = {f"{name}.lora_A.weight": torch.ones(1, width), f"{name}.lora_B.weight": torch.full((width, 1), value)}
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_the_table_and_an_adapter_that_changes_nothing(compare, tmp_path):
    done = compare(lora(tmp_path / "zeros"), lora(tmp_path / "noise", value=0.5), "--validate", 1)
    assert done.exit_code == 0, done.output
    assert "Loss on 1 song relative to acestep-v15-base without adapter" in done.stdout
    assert "zeros holds only zeros" in done.stdout
    rows = [line for line in done.stdout.splitlines() if "zeros  " in line]
    assert len(rows) == 2 and all(row.count("+0.00%") == 9 for row in rows), "with and without condition"
    assert "None is better than the model without adapter" in done.stdout


def test_an_adapter_of_nan_is_no_candidate(compare, tmp_path):
    """Whichever comes first: NaN is below no number and above none."""
    nan, noise = lora(tmp_path / "nan", value=float("nan")), lora(tmp_path / "noise", value=0.5)
    for adapters in ((nan, noise), (noise, nan)):
        done = compare(*adapters, "--validate", 1)
        assert done.exit_code == 0, done.output
        assert "noise is nearest" in done.stdout and "nan%" not in done.stdout
        assert "Note: " in done.stdout and "nan gives NaN or infinity: its weights hold some" in done.stdout
        (row, _) = [line for line in done.stdout.splitlines() if "nan  " in line]
        assert row.count("NaN") == 9
    text = compare(nan, noise, "--validate", 1, "--json").stdout
    found = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))["adapters"]
    assert (
        found[0]["loss_by_t"] == [None] * 8
        and found[0]["loss"] is None
        and found[0]["change"] is None
        and found[1]["change"] > 0
    )
    done = compare(nan, "--validate", 1)
    assert done.exit_code == 0 and "No adapter gives a loss that is a number" in done.stdout


def test_each_adapter_at_several_strengths(compare, tmp_path):
    """Half the strength is the adapter with half the weights."""
    pytest.importorskip("matplotlib")
    one, half = lora(tmp_path / "one", value=0.5), lora(tmp_path / "half", value=0.25)
    picture = tmp_path / "strengths.png"
    done = compare(one, half, "--strengths", "0.5,1", "--validate", 1, "--json", "--plot", picture)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["adapters"]
    assert [entry["strength"] for entry in found] == [0.5, 1.0, 0.5, 1.0]
    assert [entry["name"].rpartition("/")[2] for entry in found] == ["one x 0.5", "one x 1", "half x 0.5", "half x 1"]
    assert found[0]["loss_by_t"] == found[3]["loss_by_t"] != found[1]["loss_by_t"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    for words in ("0", "1,1", "a", "-1", "11", ""):
        wrong = compare(one, "--strengths", words)
        assert wrong.exit_code == 2 and "trength" in wrong.stderr, words


def test_the_best_strength_can_be_written_into_a_copy(compare, train, tmp_path):
    """The last line says the command, and the copy plays so at strength 1."""
    trained = train("base", max_epochs=1).output / "final"
    done = compare(trained, "--strengths", "1,2", "--validate", 1)
    assert done.exit_code == 0, done.output
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("Lowest loss: ")]
    assert row.split(",")[0].endswith("final x 2"), "after one epoch it can be stronger"
    words = shlex.split(done.stdout.splitlines()[-1].partition(": ")[2])
    assert words[1:] == ["export", str(trained), "--to", "universal", "--strength", "2"]
    assert CliRunner().invoke(cli, [*words[1:], "--output", str(tmp_path / "copy")]).exit_code == 0
    alike = json.loads(compare(trained, tmp_path / "copy", "--strengths", "1,2", "--validate", 1, "--json").stdout)
    assert alike["adapters"][2]["loss_by_t"] == pytest.approx(alike["adapters"][1]["loss_by_t"], rel=1e-5)
    assert "To make a copy" not in compare(trained, "--validate", 1).stdout


@pytest.mark.parametrize(
    "made, told",
    [
        ({"width": 48}, "has a weight of 48 x 48 for layers.0.self_attn.q_proj, acestep-v15-base has 64 x 64"),
        ({"layer": "layers.7.self_attn.q_proj"}, "a layer that acestep-v15-base does not have"),
    ],
)
def test_an_adapter_for_another_model_is_refused_before_it_is_loaded(compare, tmp_path, made, told):
    done = compare(lora(tmp_path / "other", value=1.0, **made))
    assert done.exit_code == 2 and told in done.stderr
    assert "Loading" not in done.stdout


def test_what_is_no_adapter_and_no_song_is_refused(compare, checkout, tmp_path):
    assert compare(tmp_path / "gone").exit_code == 2
    assert "No adapter at" in compare(tmp_path / "gone").stderr
    adapter = lora(tmp_path / "zeros")
    done = compare(adapter, dataset=checkout.xl_tensors)
    assert done.exit_code == 2 and "conditions of width 48" in done.stderr
    done = compare(adapter, "--plot", tmp_path / "a.jpg")
    assert done.exit_code == 2 and "--plot" in done.stderr
    done = compare(adapter, "--validate", 6)
    assert done.exit_code == 2 and "would hold out 6 of 6 songs" in done.stderr


def test_the_model_is_the_adapters_songs_that_it_knows_are_told_and_no_difference_is_none(train, checkout, tmp_path):
    output = train("base", options={"validate": 1, "validate_every": 5}, max_epochs=1).output
    places = ["--acestep-root", str(checkout.root), "--checkpoint-dir", str(checkout.checkpoints), "--device", "cpu"]
    line = ["compare", str(output / "final"), str(output), "--dataset-dir", str(checkout.tensors), *places]
    done = CliRunner().invoke(cli, line, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "relative to acestep-v15-base without adapter" in done.output
    for name in (output / "final", output):
        note = f"Note: {name} was trained on 5 of these 6 songs, which makes it look better than it is."
        assert note in done.output, done.output
    assert re.search(r"^No difference between .* and .*, [-+]\d+\.\d\d %, with 15 % of it without", done.output, re.M)

    done = CliRunner().invoke(cli, [*line, "--validate", "1"], catch_exceptions=False)
    assert "was trained on" not in done.output, "the song that was held out is not one of them"

    (file,) = (output / "final").rglob("training_config.json")
    shutil.copytree(file.parent, tmp_path / "silent")
    for name in ("training_config.json", "README.md"):
        (tmp_path / "silent" / name).unlink()
    save_file(load_file(file.parent / "adapter_model.safetensors"), tmp_path / "silent" / "adapter_model.safetensors")
    done = CliRunner().invoke(cli, [*line[:2], str(tmp_path / "silent"), *line[3:]])
    assert done.exit_code == 2 and "silent does not say for which model it was trained" in done.stderr, done.output
