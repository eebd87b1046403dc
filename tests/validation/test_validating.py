"""Validation on songs that are held out: it measures the same every time, and nothing of it reaches the training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from sidestep_plugin import Refusal
from sidestep_plugin.songs.dataset import songs_in
from sidestep_plugin.timesteps.schedule import max_of_two_logit_normal_cdf
from sidestep_plugin.timesteps.treatment import validation_grid
from sidestep_plugin.validation.held_out import check_apart, choose, number_of

TWO = {"validate": 2, "validate_every": 1}


SETTINGS = [
    pytest.param("lora", {}, marks=pytest.mark.slow),
    ("lora", {"batch_size": 1, "gradient_accumulation_steps": 3}),
    pytest.param("lokr", {}, marks=pytest.mark.slow),
    ("lokr", {"batch_size": 1, "gradient_accumulation_steps": 3}),
]


@pytest.mark.parametrize("kind, settings", SETTINGS)
def test_the_training_is_the_same_bit_for_bit(train, checkout, folder_of, equal_bits, measured, kind, settings):
    """The reference has only the songs that are left. LoRA dropout and condition dropout are on."""
    songs = songs_in(checkout.tensors)
    left = folder_of(song for song in songs if song not in choose(songs, 2))
    plain = train("base", kind, tensors=left, max_epochs=3, **settings)
    assert not measured
    validated = train("base", kind, tensors=folder_of(songs), options=TWO, max_epochs=3, **settings)
    assert sorted(measured) == [0, 1, 2, 3], validated.messages
    assert equal_bits(plain, validated)
    assert not torch.equal(measured[0], measured[3]), "something was learned"


# -- what is measured ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", pytest.param("lokr", marks=pytest.mark.slow)])
def test_a_learning_rate_of_zero_gives_the_same_number_in_every_epoch(train, measured, kind):
    """Epoch 0 is the model without adapter: a fresh adapter changes nothing."""
    train("base", kind, options=TWO, learning_rate=0.0)
    assert [torch.equal(measured[0], measured[epoch]) for epoch in (1, 2)] == [True, True]
    assert measured[0].shape == (2, 8, 2) and measured[0].unique().numel() == measured[0].numel()


def test_turbo_is_measured_at_its_inference_steps(train, measured):
    train("turbo", options=TWO, max_epochs=1)
    assert measured[1].shape == (2, 8, 1), "it is generated without guidance"


def test_the_grid_stands_for_equal_shares_of_the_law():
    from sidestep_plugin.run import ModelFacts
    from sidestep_plugin.timesteps.treatment import decide_treatment

    config = {"is_turbo": False, "timestep_mu": -0.4, "timestep_sigma": 1.0}
    grid = validation_grid(decide_treatment(ModelFacts("acestep-v15-base", config, config)))
    assert [round(max_of_two_logit_normal_cdf(t, -0.4, 1.0) * 8, 9) for t in grid] == [n + 0.5 for n in range(8)]
    turbo = validation_grid(decide_treatment(ModelFacts("acestep-v15-turbo", config | {"is_turbo": True}, None)))
    assert len(turbo) == 8 and turbo[0] == 0.3 and turbo[-1] == 1.0


def evaluated(trainer, module, songs, plan_of):
    """The losses of a module, as `compare` and a training measure them."""
    from sidestep_plugin import attach
    from sidestep_plugin.engine.evaluation import evaluate
    from sidestep_plugin.validation.comparing import as_in_a_training

    with attach(trainer, announce=lambda _: None), as_in_a_training(trainer, module):
        return evaluate(module, songs, plan_of, (True, False))


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_best_has_the_weights_that_were_measured(
    train, trainer, checkout, load, module_for, measured, require_kind, kind
):
    from sidestep_plugin.resuming.checkpoints import read_checkpoint

    result = train("base", kind, options=TWO, batch_size=1, gradient_accumulation_steps=3)
    means = {epoch: float(losses.mean()) for epoch, losses in measured.items()}
    assert means[2] < means[1] < means[0]
    folder = result.output / "checkpoints" / "best"
    facts = json.loads(next(folder.rglob("training_config.json")).read_text(encoding="utf-8"))
    assert facts["epoch"] in (2, None), "some versions do not say it"
    assert (facts["validation_epoch"], facts["validation_songs"], facts["held_out_songs"]) == (2, 2, 2)
    mean = 0.85 * measured[2][..., 0].mean() + 0.15 * measured[2][..., 1].mean()
    assert facts["validation_loss"] == round(float(mean), 6)
    assert facts["validation_improved"] == 1.0 and facts["validation_change"] < 0.0
    module = module_for(load("base"), kind)
    weights = read_checkpoint(folder).point.weights
    if kind == "lora":
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(module.model.decoder, dict(weights))
    else:
        module.lycoris_net.load_state_dict(dict(weights), strict=False)
    songs = choose(songs_in(checkout.tensors), 2)
    from sidestep_plugin.run import ModelFacts
    from sidestep_plugin.timesteps.treatment import decide_treatment

    grid = validation_grid(decide_treatment(ModelFacts.from_model(module.model)))
    assert torch.equal(evaluated(trainer, module, songs, grid), measured[2])


def test_nothing_is_different_after_an_evaluation(trainer, checkout, load, module_for):
    """Random states, modes, recorded losses, gradients, and which tensors are trained."""
    import random

    from sidestep_plugin.engine.decoders import without_adapter

    numpy = pytest.importorskip("numpy")
    module = module_for(load("base"))
    module.model.decoder.train()
    module.training_losses.append(1.0)
    for weight in module.parameters():
        weight.grad = torch.ones_like(weight) if weight.requires_grad else None

    def state():
        return (
            torch.get_rng_state().tolist(),
            random.getstate(),
            str(numpy.random.get_state()),
            [part.training for part in module.modules()],
            list(module.training_losses),
            [(weight.requires_grad, weight.grad is None) for weight in module.parameters()],
        )

    before = state()
    evaluated(trainer, module, songs_in(checkout.tensors)[:1], (0.5,))
    with without_adapter(module):
        pass
    assert state() == before


def test_without_lightning_it_is_the_same_bit_for_bit(
    train, trainer, checkout, folder_of, equal_bits, measured, monkeypatch
):
    monkeypatch.setattr(trainer, "LIGHTNING_AVAILABLE", False)
    songs = songs_in(checkout.tensors)
    settings = {"batch_size": 1, "gradient_accumulation_steps": 3}
    left = folder_of(song for song in songs if song not in choose(songs, 2))
    plain = train("base", tensors=left, **settings)
    if not plain.tensors:
        pytest.skip("this version of ACE-Step cannot train without Lightning here")
    validated = train("base", tensors=folder_of(songs), options=TWO, **settings)
    assert sorted(measured) == [0, 1, 2]
    assert equal_bits(plain, validated)


@pytest.mark.slow
@pytest.mark.parametrize("lightning", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["lora", pytest.param("lokr", marks=pytest.mark.slow)])
def test_resuming_from_best_equals_an_unbroken_training(
    train,
    trainer,
    checkout,
    folder_of,
    equal_bits,
    overfitting,
    load,
    module_for,
    measured,
    monkeypatch,
    kind,
    lightning,
):
    """Best comes behind the optimizer step for what is left of an epoch, and has the loss that `compare` finds."""
    from sidestep_plugin.resuming.checkpoints import read_checkpoint

    if not lightning:
        monkeypatch.setattr(trainer, "LIGHTNING_AVAILABLE", False)
    options = {"validate": 4, "validate_every": 1}
    settings = {"batch_size": 1, "gradient_accumulation_steps": 3, "max_epochs": 8, "learning_rate": 1e-2}
    whole = train("base", kind, tensors=overfitting, options=options, save_every_n_epochs=100, **settings)
    if not whole.tensors and not lightning:
        pytest.skip("this version of ACE-Step cannot train without Lightning here")
    means = {epoch: float((0.85 * loss[..., 0] + 0.15 * loss[..., 1]).mean()) for epoch, loss in measured.items()}
    expected = dict(measured)
    best = min((epoch for epoch in means if epoch), key=lambda epoch: means[epoch])
    assert best < 8, "something is left to train"
    folder = whole.output / "checkpoints" / "best"
    facts = json.loads(next(folder.rglob("training_config.json")).read_text(encoding="utf-8"))
    assert facts["validation_epoch"] == best and facts["validation_loss"] == round(means[best], 6)
    point = read_checkpoint(folder).point
    assert (point.epochs, point.steps) == (best, 0)
    measured.clear()
    rest = train("base", kind, tensors=overfitting, options=options, resume_from=str(folder), **settings)
    assert sorted(measured) == list(range(best + 1, 9))
    assert all(torch.equal(measured[epoch], expected[epoch]) for epoch in measured)
    assert all(torch.equal(whole.tensors[key], rest.tensors[key]) for key in whole.tensors)
    assert torch.equal(whole.rng_state, rest.rng_state)
    if trainer.sample_discrete_timestep.__code__.co_varnames[1] == "device":
        return  # this version needs Fabric to compute in bf16, so its module cannot be evaluated on its own
    assert torch.equal(evaluated_alone(trainer, load("base"), module_for, kind, point, overfitting), expected[best])


def evaluated_alone(trainer, handler, module_for, kind, point, folder):
    """The losses of a checkpoint's adapter in a fresh module, on four held-out songs: those that `compare` finds."""
    from sidestep_plugin.run import ModelFacts
    from sidestep_plugin.timesteps.treatment import decide_treatment

    module = module_for(handler, kind)
    if kind == "lora":
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(module.model.decoder, dict(point.weights))
    else:
        module.lycoris_net.load_state_dict(dict(point.weights), strict=False)
    grid = validation_grid(decide_treatment(ModelFacts.from_model(module.model)))
    return evaluated(trainer, module, choose(songs_in(folder), 4), grid)


def test_what_fails_between_two_epochs_without_lightning_is_reported(train, trainer, checkout, monkeypatch):
    """As upstream reports what fails in its own loop, and the training is saved."""
    from sidestep_plugin.engine import services

    monkeypatch.setattr(trainer, "LIGHTNING_AVAILABLE", False)
    evaluate, calls = services.evaluate, iter(range(100))

    def fails_in_epoch_1(*given, **more):
        if next(calls) == 1:
            raise RuntimeError("out of memory")
        return evaluate(*given, **more)

    monkeypatch.setattr(services, "evaluate", fails_in_epoch_1)
    done = train("base", options=TWO)
    if checkout.real and not done.losses:
        pytest.skip("this version of ACE-Step cannot train without Lightning here")
    assert done.messages[-1].startswith("❌") and "RuntimeError: out of memory" in done.messages[-1]
    assert (done.output / "interrupted").is_dir() and not done.tensors


@pytest.mark.parametrize("kind", [pytest.param("lora", marks=pytest.mark.slow), "lokr"])
def test_a_resumed_training_measures_what_it_would_have(train, measured, kind, capsys):
    settings = {"batch_size": 1, "gradient_accumulation_steps": 3, "max_epochs": 4}
    options = {"validate": 2, "validate_every": 1}
    whole = train("base", kind, options=options, **settings)
    expected = dict(measured)
    measured.clear()
    checkpoint = sorted((whole.output / "checkpoints").glob("epoch_2*"))[0]
    rest = train("base", kind, options=options, resume_from=str(checkpoint), **settings)
    assert sorted(measured) == [3, 4], "the model without adapter is not measured again"
    assert all(torch.equal(measured[epoch], expected[epoch]) for epoch in measured)
    assert all(torch.equal(whole.tensors[key], rest.tensors[key]) for key in whole.tensors)
    reports = [
        json.loads((run.output / "training_report.json").read_text(encoding="utf-8"))["validation"]
        for run in (whole, rest)
    ]
    assert reports[0] == reports[1] and [entry["epoch"] for entry in reports[0]["epochs"]] == [0, 1, 2, 3, 4]


# -- best and patience -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", pytest.param("lokr", marks=pytest.mark.slow)])
def test_a_planted_overfit_turns_the_curve_and_patience_stops_it(train, measured, overfitting, capsys, kind, load):
    options = {"validate": 4, "validate_every": 1, "patience": 2}
    rate = {"lora": 3e-3, "lokr": 3e-3}[kind]
    result = train(
        "base", kind, tensors=overfitting, options=options, max_epochs=40, learning_rate=rate, save_every_n_epochs=100
    )
    out = capsys.readouterr().out
    means = {epoch: float((0.85 * loss[..., 0] + 0.15 * loss[..., 1]).mean()) for epoch, loss in measured.items()}
    best = min((epoch for epoch in means if epoch), key=lambda epoch: means[epoch])
    last = max(means)
    assert last == best + 2 < 40, means
    assert f"final is the best adapter, of epoch {best}" in result.messages[-1] or any(
        f"final is the best adapter, of epoch {best}" in line for line in result.messages
    )
    assert f"not better than epoch {best} for 2 validations" in out
    saved = [next((result.output / place).rglob("*.safetensors")) for place in ("final", "checkpoints/best")]
    from safetensors.torch import load_file

    final, kept = (load_file(file) for file in saved)
    assert final.keys() == kept.keys() and all(torch.equal(final[key], kept[key]) for key in final)
    facts = json.loads(next((result.output / "final").rglob("training_config.json")).read_text(encoding="utf-8"))
    assert facts["validation_epoch"] == best


# -- songs -----------------------------------------------------------------------------------------------------------


def test_songs_are_chosen_by_their_names_alone():
    songs = [Path("a", f"{number}.pt") for number in range(20)]
    chosen = choose(songs, 5)
    elsewhere = choose([Path("b", song.name) for song in reversed(songs)], 5)
    assert {song.name for song in chosen} == {song.name for song in elsewhere} and len(chosen) == 5
    assert set(choose(songs, 4)) < set(chosen), "one song more leaves the others where they are"


@pytest.mark.parametrize("said, songs, count", [(2.0, 6, 2), (0.1, 6, 1), (0.5, 6, 3), (0.01, 300, 3)])
def test_how_many_songs_are_held_out(said, songs, count):
    assert number_of(said, songs) == count


def test_a_song_under_two_names_is_refused(checkout, folder_of):
    first, second = songs_in(checkout.tensors)[:2]
    folder = folder_of([first, second])
    song = torch.load(folder / first.name, weights_only=True)
    torch.save(song | {"metadata": {"caption": "the same song, preprocessed again"}}, folder / "again.pt")
    check_apart([folder / first.name], [folder / second.name])
    with pytest.raises(Refusal, match=r"again\.pt is held out .*song_01\.pt .* is the same song \(same latents\)"):
        check_apart([folder / first.name], [folder / "again.pt"])


@pytest.mark.parametrize(
    "options, told",
    [
        ({"validate": 6}, "would hold out 6 of 6 songs, and none would be left"),
        ({"validate": 2, "validation_dir": "songs"}, "Leave one of them out"),
        ({"patience": 3}, "--patience says how to validate, and nothing is validated"),
        ({"validate_every": 3}, "--validate-every says how to validate"),
    ],
)
def test_what_cannot_be_validated_is_refused(train, options, told):
    result = train("base", options=options)
    assert told in result.messages[-1] and not result.tensors


def test_upstreams_validation_is_refused_beside_it(train, trainer):
    if "val_split" not in trainer.TrainingConfig.__dataclass_fields__:
        pytest.skip("this version of ACE-Step has no val_split")
    result = train("base", options={"validate": 1}, val_split=0.3)
    assert "--val-split is ACE-Step's own validation" in result.messages[-1] and not result.tensors


def test_a_validation_folder_of_another_width_is_refused(train, checkout):
    result = train("base", options={"validation_dir": checkout.xl_tensors})
    assert "conditions of width 48" in result.messages[-1] and not result.tensors


def test_songs_of_another_folder(train, checkout, folder_of, measured, equal_bits):
    """All songs of the dataset are trained on. A copy among them is refused."""
    from sidestep_plugin.miniature import CONDITION_WIDTH, write_tensors

    folder = folder_of([])
    write_tensors(folder, condition_width=CONDITION_WIDTH, songs=2, seed=999)
    for file in folder.glob("*.pt"):
        file.rename(file.with_name(f"other_{file.name}"))
    (folder / "manifest.json").unlink()
    plain = train("base", max_epochs=1)
    validated = train("base", options={"validation_dir": folder}, max_epochs=1)
    assert equal_bits(plain, validated) and measured[1].shape == (2, 8, 2)
    shutil.copy(songs_in(checkout.tensors)[0], folder / "copy.pt")
    result = train("base", options={"validation_dir": folder}, max_epochs=1)
    assert "copy.pt is held out for validation" in result.messages[-1] and not result.tensors


def test_songs_missing_on_resume_are_named(train, checkout, folder_of):
    songs = songs_in(checkout.tensors)
    folder = folder_of(songs)
    first = train("base", tensors=folder, options={"validate": 1}, max_epochs=1)
    checkpoint = next((first.output / "checkpoints").glob("epoch_1*"))
    (held_out,) = choose(songs, 1)
    shutil.copy(folder / held_out.name, folder / "zzz.pt")
    (folder / held_out.name).unlink()
    result = train("base", tensors=folder, options={"validate": 1}, max_epochs=2, resume_from=str(checkpoint))
    assert f"are missing in {folder}: {held_out.name}. Put them back" in result.messages[-1]
    again = train("base", tensors=folder_of(songs), max_epochs=2, resume_from=str(checkpoint))
    assert "this run would hold out others (none)" in again.messages[-1]


def test_a_loss_that_is_not_finite_is_told_once_and_never_best(train, monkeypatch, capsys):
    from sidestep_plugin.engine import services as validation

    evaluate, calls = validation.evaluate, iter(range(100))

    def nan_in_epoch_2(*args, **kwargs):
        losses = evaluate(*args, **kwargs)
        return losses * float("nan") if next(calls) >= 2 else losses

    monkeypatch.setattr(validation, "evaluate", nan_in_epoch_2)
    result = train("base", options=TWO, max_epochs=3)
    out = capsys.readouterr().out
    assert out.count("is NaN or infinite, so this epoch cannot be the best") == 1
    assert result.tensors, "the training goes on"
    report = json.loads((result.output / "training_report.json").read_text(encoding="utf-8"))["validation"]
    assert report["best_epoch"] == 1 and report["epochs"][2]["loss"] is None


def test_a_song_without_a_loss_is_refused_before_the_first_step(train, monkeypatch):
    from sidestep_plugin.engine import services as validation

    evaluate = validation.evaluate
    monkeypatch.setattr(validation, "evaluate", lambda *given, **more: evaluate(*given, **more) * float("nan"))
    result = train("base", options=TWO)
    assert "is NaN or infinite even without an adapter" in result.messages[-1] and not result.losses


def test_a_folder_without_songs_holds_nothing_out_in_silence(train, tmp_path):
    (tmp_path / "empty").mkdir()
    done = train("base", tensors=tmp_path / "empty", options=TWO)
    assert "--validate 2 would hold out 2 of 0 songs" in done.messages[-1] and not done.losses
