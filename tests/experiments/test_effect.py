"""The experiment's own tools: what is planted is found, what is not there is not called an effect, pairs are pairs."""

from __future__ import annotations

import copy
import importlib
import json
import math
import os
import random
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from experiments.effect import (
    base_model,
    data,
    experiment,
    figure,
    intervals,
    judge,
    measures,
    recipe,
    report,
    runs,
    sampling,
)
from experiments.effect.presets import HIGH, LAW_DROP, PADDED, TINY, UPSTREAM, Arm
from safetensors.torch import save_file

from sidestep_plugin import Refusal, hookimpl, miniature

TINY_REAL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "text_hidden_dim": 32,
    "num_lyric_encoder_hidden_layers": 1,
    "num_timbre_encoder_hidden_layers": 1,
    "num_attention_pooler_hidden_layers": 1,
    "num_audio_decoder_hidden_layers": 1,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 32,
    "timbre_hidden_dim": 64,
    "fsq_dim": 64,
}


def planted(effect, seed, seeds=5, cells=4):
    """Values of (seed, arm): what the arms share is large, what they differ in is small."""
    generator = random.Random(seed)
    values = {}
    for number in range(seeds):
        shared = [generator.gauss(10.0, 3.0) for _ in range(cells)]
        for arm in ("eight", "law+drop"):
            gain = effect if arm == "law+drop" else 0.0
            values[number, arm] = [value + gain + generator.gauss(0.0, 0.1) for value in shared]
    return values


PLUGIN = intervals.CONTRASTS["plugin − ACE-Step"]


def test_a_planted_effect_is_found():
    found = intervals.contrast(planted(-0.5, seed=1), PLUGIN)
    assert found.shown and found.high < 0.0 and found.mean == pytest.approx(-0.5, abs=0.15)


def test_a_null_comparison_is_rarely_called_an_effect():
    called = sum(intervals.contrast(planted(0.0, seed=seed), PLUGIN).shown for seed in range(300))
    assert called <= 0.07 * 300  # 5 % are expected


def test_the_usual_percentile_interval_would_call_too_many(monkeypatch):
    monkeypatch.setattr(intervals, "expanded_tail", lambda number, level=0.95: 0.025)
    monkeypatch.setattr(intervals, "student", lambda number, level=0.95: 0.0)
    called = sum(intervals.contrast(planted(0.0, seed=seed), PLUGIN).shown for seed in range(300))
    assert called > 0.1 * 300


def test_an_interval_of_many_seeds_is_drawn_the_same_way_every_time():
    values = [random.Random(seed).gauss(1.0, 1.0) for seed in range(12)]
    one, other = intervals.difference(values), intervals.difference(values)
    assert one == other and one.low < one.mean < one.high


def test_two_seeds_show_nothing():
    found = intervals.difference([1.0, 1.0])
    assert found.mean == 1.0 and math.isnan(found.low) and not found.shown


def test_a_seed_that_lacks_a_cell_is_left_out():
    values = planted(-0.5, seed=1)
    values[3, "law+drop"].pop()
    del values[4, "eight"]
    assert len(intervals.contrast(values, PLUGIN).seeds) == 3


def test_contrasts_of_equal_arms_are_zero():
    assert all(sum(weights.values()) == 0.0 for weights in intervals.CONTRASTS.values())


def songs(number, seed, kind=None):
    domain = data.base_domain(12, 8)
    return data.draw(data.target_domain(kind, domain, 0) if kind else domain, number, 24, seed)


def test_distances_between_sets_of_one_domain_are_zero_on_average():
    scale = measures.Scale.of(songs(256, 1).latents)
    pairs = [[scale.features(songs(64, 10 * i + j).latents) for j in range(2)] for i in range(20)]
    energies = [measures.energy_distance(*pair) for pair in pairs]
    kernels = [measures.kernel_distance(*pair, scale.bandwidth) for pair in pairs]
    far = scale.features(songs(64, 3, "far").latents)
    for values, other in (
        (energies, measures.energy_distance(pairs[0][0], far)),
        (kernels, measures.kernel_distance(pairs[0][0], far, scale.bandwidth)),
    ):
        mean = sum(values) / len(values)
        error = (sum((value - mean) ** 2 for value in values) / 19 / 20) ** 0.5
        assert abs(mean) < 3.5 * error and min(values) < 0.0
        assert other > 5 * max(map(abs, values))


def test_copies_of_training_songs_are_told_from_new_songs():
    scale = measures.Scale.of(songs(256, 1).latents)
    training, held_out, new = songs(48, 2).latents, songs(48, 3).latents, songs(48, 4).latents
    copies = training[:4].repeat(12, 1, 1)
    honest = measures.compare(scale, new, held_out, training)
    copied = measures.compare(scale, copies, held_out, training)
    assert copied["copying"] < 0.01 and honest["copying"] == pytest.approx(1.0, abs=0.2)
    assert copied["coverage"] < 0.7 * honest["coverage"]


def test_near_lies_between_the_base_domains_timbres_and_far_does_not():
    base = data.base_domain(12, 8)

    def overlap(kind):
        domain = data.target_domain(kind, base, 0)
        return max(float((domain.timbres[0] @ timbre.T).square().sum()) / data.PARTIALS for timbre in base.timbres)

    assert overlap("near") > 0.5 and overlap("near") > overlap("far")
    for kind in ("near", "far"):
        made = data.target_domain(kind, base, 0)
        assert torch.allclose(made.timbres[0] @ made.timbres[0].T, torch.eye(data.PARTIALS), atol=1e-5)


def test_latents_of_the_base_domain_have_variance_one():
    assert float(songs(2000, 5).latents.std()) == pytest.approx(1.0, abs=0.03)


class Gaussian:
    """A "model" whose velocity is exact for data drawn from a normal law with this mean and deviation."""

    def __init__(self, mean=2.0, deviation=0.5):
        self.mean, self.deviation = mean, deviation
        self.null_condition_emb = torch.zeros(1, 1, 3)
        self.decoder = self.velocity

    def velocity(self, hidden_states, timestep, encoder_hidden_states, **_):
        t, x = timestep[:, None, None], hidden_states
        mean = self.mean + encoder_hidden_states.mean((1, 2))[:, None, None]
        total = t**2 + (1 - t) ** 2 * self.deviation**2
        noise = t * (x - (1 - t) * mean) / total
        song = mean + (1 - t) * self.deviation**2 * (x - (1 - t) * mean) / total
        return (noise - song,)


def test_a_generation_follows_the_velocity_to_the_data():
    model, conditions = Gaussian(), torch.full((64, 2, 3), 0.25)
    noise = torch.randn(64, 24, 12, generator=torch.Generator().manual_seed(1))
    off = Gaussian(mean=1.0).decoder
    guidances = (3.0, 1.0, 2.0)
    several = sampling.generate(model, conditions, noise, guidances=guidances, steps=200)
    for guidance, made in zip(guidances, several, strict=True):
        assert float(made.mean()) == pytest.approx(2.0 + 0.25 * guidance, abs=0.02)
        assert float(made.std()) == pytest.approx(0.5, abs=0.02)
        (alone,) = sampling.generate(model, conditions, noise, guidances=[guidance], steps=200)
        assert torch.allclose(made, alone, atol=1e-5)
    plain, other = sampling.generate(model, conditions, noise, guidances=[1.0, 3.0], steps=200, null_decoder=off)
    assert torch.allclose(plain, several[1], atol=1e-5)
    assert float(other.mean()) == pytest.approx(1.0 + 1.25 * 3.0, abs=0.02)


def test_the_held_out_loss_is_that_of_the_velocity():
    model, held_out = Gaussian(deviation=0.5), data.Songs(torch.full((16, 8, 4), 2.0), torch.zeros(16, 2, 3))
    found = measures.held_out_losses(model, held_out, bands=4, seed=1)
    assert found["conditioned"] == found["free"] == pytest.approx(sum(found["curves"]["free"]) / 4)
    assert sum(measures.law_weights(16)) == pytest.approx(1.0)
    nothing = SimpleNamespace(null_condition_emb=model.null_condition_emb, decoder=lambda hidden_states, **_: [0.0])
    # Noise minus a constant 2: variance 1 and mean -2.
    assert measures.held_out_losses(nothing, held_out, bands=4, seed=1)["free"] == pytest.approx(5.0, abs=0.2)


@pytest.fixture(scope="module")
def small(trainer, tmp_path_factory):
    """The tiny preset's untrained miniature with the trainer in use."""
    out = tmp_path_factory.mktemp("effect")
    return SimpleNamespace(trainer=trainer, model=base_model.build(TINY, None, out), out=out)


class Watcher:
    def __init__(self):
        self.songs, self.states, self.times, self.dropped = [], [], [], []

    @hookimpl
    def acestep_prepare_batch(self, batch):
        self.songs.append(batch["target_latents"].clone())
        self.dropped.append((batch["encoder_hidden_states"].std(dim=1) == 0).all(-1))
        self.states.append(torch.get_rng_state())

    @hookimpl
    def acestep_step_finished(self, step):
        self.times.append(step.t)


def trained(small, arm, **changes):
    watcher, cell = Watcher(), runs.Cell("far", 8, 3, arm)
    preset = replace(TINY, songs=(8,), lengths=(2, 6), **changes)
    domain = data.target_domain("far", data.base_domain(preset.channels, preset.hidden), 3)
    made = runs.training_songs(preset, domain, cell)
    weights = dict(runs.train(preset, small.trainer, small.model, cell, made, small.out / "work", {"watch": watcher}))
    return watcher, weights


def test_arms_of_one_seed_differ_only_in_what_is_compared(small):
    often = replace(LAW_DROP, cfg_ratio=0.5)
    (one, _), (other, _), (third, _) = trained(small, UPSTREAM), trained(small, often), trained(small, often)
    assert all(map(torch.equal, one.songs, other.songs))
    assert all(map(torch.equal, one.states, other.states)) and len(one.states) == 6
    assert not torch.equal(torch.cat(one.times), torch.cat(other.times))
    assert not torch.cat(one.dropped).any() and torch.cat(other.dropped).any()
    assert all(map(torch.equal, other.dropped, third.dropped)) and all(map(torch.equal, other.times, third.times))
    assert not torch.equal(one.songs[0], one.songs[2])  # shuffled in each epoch, in the same way
    steps = {round(float(t), 4) for t in torch.cat(one.times)}
    assert steps <= {1.0, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3}


def test_a_share_of_high_timesteps_is_drawn_instead_of_the_law(small):
    high, _ = trained(small, replace(HIGH, high_share=1.0))
    assert all(0.9 <= float(t) <= 1.0 for t in torch.cat(high.times))
    some, _ = trained(small, HIGH)
    assert {bool(t > 0.9) for t in torch.cat(some.times)} == {True, False}


def test_padded_conditions_lack_their_opening_and_differ_in_nothing_else(small):
    domain = data.base_domain(12, 64)
    songs = data.draw(domain, 3, 24, 1)
    padded = data.as_preprocessed(songs.conditions)
    assert padded.shape == (3, data.TOKENS - 1 + data.PADDING, 64)
    assert torch.equal(padded[:, : data.TOKENS - 1], songs.conditions[:, 1:])
    assert bool((padded[:, data.TOKENS - 1 :] == padded[0, -1]).all()), "every row of padding is the same"
    (plain, _), (told, _) = trained(small, LAW_DROP), trained(small, PADDED)
    assert all(map(torch.equal, plain.songs, told.songs)) and all(map(torch.equal, plain.times, told.times))
    assert all(map(torch.equal, plain.dropped, told.dropped)) and all(map(torch.equal, plain.states, told.states))


def test_arms_of_one_seed_start_from_the_same_adapter(small):
    (_, one), (_, other) = (trained(small, replace(arm, lr_factor=0.0)) for arm in (UPSTREAM, LAW_DROP))
    assert one[6].keys() == other[6].keys() and all(torch.equal(one[6][name], other[6][name]) for name in one[6])
    assert any(value.any() for name, value in one[6].items() if name.endswith("lora_A"))


def test_means_over_the_steps_count_step_k_as_a_power_of_k(small):
    kept, means = [], runs.Means(("tenth", "third"))

    class Kept(runs.Means):
        def add(self, weights):
            kept.append(weights)
            means.add(weights)

    preset, cell = replace(TINY, songs=(8,), lengths=(3, 6)), runs.Cell("far", 8, 3, LAW_DROP)
    domain = data.target_domain("far", data.base_domain(preset.channels, preset.hidden), 3)
    made = runs.training_songs(preset, domain, cell)
    weights = dict(runs.train(preset, small.trainer, small.model, cell, made, small.out / "work", means=Kept(())))
    _, unwatched = trained(small, LAW_DROP)
    assert len(kept) == 6 and all(torch.equal(kept[-1][key], value) for key, value in weights[6].items())
    assert all(torch.equal(unwatched[6][key], value) for key, value in weights[6].items())
    found = means.now()
    assert found.keys() == {"tenth", "third", "third, exact"}
    layer = next(key for key in kept[0] if key.endswith("lora_A")).removesuffix(".lora_A")
    shares = [k**4 / sum(j**4 for j in range(1, 7)) for k in range(1, 7)]
    ups, downs = [each[f"{layer}.lora_B"] for each in kept], [each[f"{layer}.lora_A"] for each in kept]
    expected = sum(share * up for share, up in zip(shares, ups, strict=True))
    assert torch.allclose(found["third"][f"{layer}.lora_B"], expected, atol=1e-6)
    exact = sum(share * up @ down for share, up, down in zip(shares, ups, downs, strict=True))
    made = found["third, exact"]
    cut = made[f"{layer}.lora_B"] @ made[f"{layer}.lora_A"]
    assert made[f"{layer}.lora_A"].shape == kept[0][f"{layer}.lora_A"].shape
    left = torch.linalg.svdvals(exact)[TINY.rank :].square().sum().sqrt()
    assert torch.linalg.norm(exact - cut) == pytest.approx(float(left), rel=1e-3, abs=1e-7)


def test_a_copy_with_the_adapters_weights_computes_what_the_adapter_computes(small):
    from peft import LoraConfig, get_peft_model

    model = copy.deepcopy(small.model)
    adapter = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped = get_peft_model(copy.deepcopy(model.decoder), adapter).eval()
    merged = base_model.with_adapter(model, runs.adapter_weights(wrapped), runs.SCALE)
    x, t, conditions = torch.randn(2, 24, TINY.channels), torch.rand(2), torch.randn(2, 4, TINY.hidden)
    with torch.no_grad():
        expected = base_model.velocity(model, x, t, conditions, wrapped)
        assert torch.allclose(base_model.velocity(model, x, t, conditions, merged), expected, atol=1e-4)
        assert not torch.allclose(base_model.velocity(model, x, t, conditions), expected, atol=1e-2)


def test_an_untrained_model_cannot_generate(small):
    domain = data.base_domain(TINY.channels, TINY.hidden)
    scale = measures.Scale.of(songs(64, 1).latents)
    judged = judge.judge(TINY, small.model, scale, domain)
    assert not judged["can_generate"] and judged["beyond"] > judge.NEAR
    assert "CANNOT generate" in experiment.verdict(judged)


def test_a_stopped_training_of_the_base_model_goes_on_as_if_it_had_not_stopped(small, monkeypatch):
    monkeypatch.setattr(base_model, "SAVE_EVERY", 2)

    def weights(name, stop_after=None):
        model, file = copy.deepcopy(small.model), small.out / f"{name}.pt"
        said = []

        def say(line):
            said.append(line)
            if stop_after is not None:
                raise KeyboardInterrupt

        base_model.train(replace(TINY, base_steps=4), model, file, say)
        return model.state_dict()

    whole = weights("whole")
    with pytest.raises(KeyboardInterrupt):
        weights("stopped", stop_after=2)
    resumed = weights("stopped")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_other_settings_are_not_mixed_in(tmp_path):
    experiment._same_settings(tmp_path / "settings.json", {"preset": {"rank": 1}})
    experiment._same_settings(tmp_path / "settings.json", {"preset": {"rank": 1}})
    with pytest.raises(Refusal, match=r"other settings \(preset\).*choose another folder with --out"):
        experiment._same_settings(tmp_path / "settings.json", {"preset": {"rank": 2}})


def planted_cells(folder, preset, missing=()):
    """Cells as the experiment writes them: the law's loss is lower by 0.2, its distance is not different."""
    judged = {
        "samples": 0.2,
        "floor": 0.1,
        "floor_highest": 0.1,
        "far": 3.0,
        "noise": 9.0,
        "ratio": 2.0,
        "beyond": 0.03,
    }
    experiment.write_json(folder / "settings.json", {"preset": preset.described()})
    experiment.write_json(folder / "judged.json", judged | {"can_generate": True})
    (folder / "cells").mkdir()
    for cell in runs.cells(preset):
        generator = random.Random(cell.name)
        law = cell.arm is not None and cell.arm.timestep_mode == "continuous"
        loss = {"conditioned, law": 1.0 - 0.2 * law + generator.gauss(0.0, 0.02), "curves": {}}
        measured = {"loss": loss, "guidance 1": {"energy": 2.0 + generator.gauss(0.0, 0.02)}}
        lengths = {str(length): measured for length in (preset.lengths if cell.arm else (0,))}
        arm = cell.arm.name if cell.arm else "untrained"
        found = {"domain": cell.domain, "songs": cell.songs, "seed": cell.seed, "arm": arm, "lengths": lengths}
        if cell.name not in missing:
            experiment.write_json(folder / "cells" / f"{cell.name}.json", found)


def test_the_tables_tell_a_planted_effect_from_none(tmp_path):
    preset = replace(TINY, domains=("near", "far"), songs=(4, 8), lengths=(4,))
    planted_cells(tmp_path, preset, missing=["far-8-seed3-law"])
    text = report.tables(tmp_path)
    assert "finished: [4] of [4, 8] songs" in text and "8 songs, 4 steps" not in text
    (loss,) = re.findall(r"\| loss, with condition \|.*", text.partition("### Near")[0])
    (distance,) = re.findall(r"\| distance, guidance 1 \|.*", text.partition("### Near")[0])
    assert loss.count("**-0.") == 2 and "**" not in distance  # the plugin and the law; not dropout
    shown = {
        (entry["measure"], entry["comparison"]) for entry in report.result(tmp_path)["comparisons"] if entry["shown"]
    }
    assert ("loss, with condition", "law − eight steps") in shown


NOT = Arm("eight", "discrete", 0.0, lr_factor=0.0)
TRAINED = Arm("law+drop", "continuous", 0.15)
AGAIN = Arm("law", "continuous", 0.15, stream=1)


@pytest.mark.slow
def test_the_whole_pipeline_finds_a_planted_effect_and_not_one_that_is_not_there(trainer, tmp_path, monkeypatch):
    """Planted: one arm does not learn at all. Not there: the same arm with other noise."""
    monkeypatch.setattr(experiment, "_import_trainer", lambda root, out: trainer)
    preset = replace(TINY, arms=(NOT, TRAINED, AGAIN), rate=1e-3, lengths=(6, 24), base_steps=60)
    lines = []
    experiment.run(preset, tmp_path, None, lines.append)
    assert sum("left" in line for line in lines if "seed" in line) == 20
    experiment.run(preset, tmp_path, None, lines.append)
    assert lines[-1] == "20 cells, 20 of them are finished"

    rows, measure = report.load(tmp_path), report.PRIMARY["loss, with condition"]
    effect = report.compared(rows, measure, PLUGIN, length=24)
    null = report.compared(rows, measure, {"law": 1.0, "law+drop": -1.0}, length=24)
    assert effect.shown and effect.high < 0.0
    assert not null.shown and abs(null.mean) < 0.2 * abs(effect.mean)

    found = report.result(tmp_path)
    assert len(found["cells"]) == 20 and any(entry["shown"] for entry in found["comparisons"])
    text = report.tables(tmp_path)
    assert "CANNOT generate" in text and "| loss, with condition |" in text
    figure.draw(tmp_path, tmp_path / "effect.png")
    assert (tmp_path / "effect.png").stat().st_size > 10_000


def test_the_recipe_trains_every_arm_of_every_seed_once_and_compares_them(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    commands = []

    def acestep_train(arguments, *, capture=False):
        words = [str(argument) for argument in arguments]
        commands.append(words)
        said = "train compare preview"
        if words[0] == "train":
            (Path(words[words.index("--output-dir") + 1]) / "final").mkdir(parents=True)
        elif words[0] == "compare":
            folders = words[1 : words.index("--model")]
            losses = [1.0 - 0.1 * ("law" in Path(folder).name) for folder in folders]
            found = [{"loss": loss, "loss_by_t": [loss, 2 * loss]} for loss in losses]
            said = json.dumps({"timesteps": [0.5, 0.9], "adapters": found})
        return subprocess.CompletedProcess(words, 0, said, "")

    monkeypatch.setattr(recipe, "run", acestep_train)
    folders = ["--acestep-root", "checkout", "--dataset-dir", "songs", "--held-out-dir", "others"]
    line = [*folders, "--out", str(tmp_path), "--seeds", "3", "--", "--epochs", "7"]
    assert recipe.main(line) == 0
    trainings = [words for words in commands if words[0] == "train"]
    assert len(trainings) == 12 and all(words[-2:] == ["--epochs", "7"] for words in trainings)
    assert {words[words.index("--timestep-mode") + 1] for words in trainings} == {"discrete", "continuous"}
    printed = capsys.readouterr().out
    assert "loss, as trained, law − eight steps: -0.1, 95 % -0.1 to -0.1\n" in printed
    assert "loss with condition at t 0.90, law − eight steps: -0.2, 95 % -0.2 to -0.2\n" in printed
    commands.clear()
    assert recipe.main(line) == 0
    assert not [words for words in commands if words[0] in ("train", "compare")]


def test_the_recipe_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setattr(recipe, "run", lambda arguments, **_: subprocess.CompletedProcess([], 0, "train", ""))
    folders = ["--acestep-root", "checkout", "--dataset-dir", "songs", "--held-out-dir", "others"]
    assert recipe.main([*folders, "--out", str(tmp_path), "--seeds", "1"]) == 2
    assert "has no 'acestep-train compare'" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="a shell script stands in for kadtk")
def test_the_recipe_has_clips_compared_with_two_encoders(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))

    def acestep_train(arguments, *, capture=False):
        words = [str(argument) for argument in arguments]
        if words[0] == "preview":
            for row in ("base_model", "final"):
                (Path(words[1]) / "previews" / row).mkdir(parents=True)
                (Path(words[1]) / "previews" / row / "song.wav").touch()
        found = {"timesteps": [], "adapters": [{"loss": 1.0}] * 4}
        return subprocess.CompletedProcess(
            words, 0, "train compare preview" if words[0] != "compare" else json.dumps(found), ""
        )

    monkeypatch.setattr(recipe, "run", acestep_train)
    (kadtk := tmp_path / "kadtk").write_text(f'#!/bin/sh\necho "$@" >> "{tmp_path}/called"\n', encoding="utf-8")
    (reference := tmp_path / "held out").mkdir()
    folders = ["--acestep-root", "checkout", "--dataset-dir", "songs", "--held-out-dir", "others"]
    line = [*folders, "--out", str(tmp_path / "out"), "--seeds", "1", "--kad-reference", str(reference)]

    def refused(*more):
        assert recipe.main([*line, *more]) == 2 and not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "Add --preview-songs 8" in refused()
    assert "No WAV files in" in refused("--preview-songs", "2")
    (reference / "a.wav").touch()
    assert "pip install kadtk" in refused("--preview-songs", "2", "--kadtk", str(tmp_path / "nothing"))
    kadtk.chmod(0o755)
    assert recipe.main([*line, "--preview-songs", "2", "--kadtk", str(kadtk)]) == 0
    called = (tmp_path / "called").read_text("utf-8").splitlines()
    assert len(called) == 8 and not [words for words in called if "base_model" in words]
    for encoder in recipe.ENCODERS:
        assert sum(words.startswith(f"{encoder} {reference} ") for words in called) == 4
        assert sum(words.endswith(f"--csv {tmp_path}/out/kad-{encoder}.csv") for words in called) == 4


def real_checkpoint(folder):
    """A tiny model of the checkout's own files, saved as an official one is."""
    modeling = importlib.import_module("acestep.models.base.modeling_acestep_v15_base")
    config = modeling.AceStepConfig(**TINY_REAL)
    torch.manual_seed(0)
    weights = modeling.AceStepConditionGenerationModel(config).state_dict()
    folder.mkdir(parents=True)
    for file in Path(modeling.__file__).parent.glob("[!_]*.py"):
        shutil.copy(file, folder)
    names = {
        "AutoConfig": "configuration_acestep_v15.AceStepConfig",
        "AutoModel": "modeling_acestep_v15_base.AceStepConditionGenerationModel",
    }
    written = config.to_dict() | {"auto_map": names, "is_turbo": False, "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(written, default=str), encoding="utf-8")
    save_file({name: value.clone() for name, value in weights.items()}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.slow
@pytest.mark.upstream
def test_the_recipe_runs_on_a_tiny_real_model(checkout, trainer, tmp_path, monkeypatch, capfd):
    pytest.importorskip("vector_quantize_pytorch", reason="upstream's models need vector-quantize-pytorch and einops")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    real_checkpoint(tmp_path / "checkpoints" / "acestep-v15-base")
    held_out = miniature.write_tensors(tmp_path / "held", condition_width=64, songs=2, seed=2)
    folders = {
        "--acestep-root": checkout.root,
        "--checkpoint-dir": tmp_path / "checkpoints",
        "--dataset-dir": checkout.tensors,
        "--held-out-dir": held_out,
        "--out": tmp_path / "out",
    }
    line = [str(word) for pair in folders.items() for word in pair]
    code = recipe.main([*line, "--seeds", "1", "--", "--epochs", "1", "--rank", "4", "--alpha", "8", "--yes"])
    finished = {folder.parent.name for folder in (tmp_path / "out").glob("*/final")}
    assert finished == {"eight-seed0", "eight-drop-seed0", "law-seed0", "law-drop-seed0"}, capfd.readouterr().err
    if code == 2:
        assert "has no 'acestep-train compare'" in capfd.readouterr().err
    else:
        assert code == 0 and (tmp_path / "out" / "recipe.json").exists()
