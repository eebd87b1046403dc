"""The running mean of an adapter while it trains: it is the mean that it says it is, and nothing of it is trained."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from sidestep_plugin import Refusal, hookimpl
from sidestep_plugin.adapters.staging import published, remove_save, staged
from sidestep_plugin.averaging.mean import POWER, RunningMean
from sidestep_plugin.engine.current import running_training
from sidestep_plugin.files import read_json_object
from sidestep_plugin.resuming.checkpoints import read_checkpoint
from sidestep_plugin.resuming.overview import saved_in

ON = {"average": True}
SETTINGS = {"batch_size": 1, "gradient_accumulation_steps": 4}
"""Two optimizer steps in an epoch of six songs: one of them of what is left at its end."""


def weights_of(tensors):
    """The mean that is promised: step k counts as k to a power; in float64."""
    counts = [k**POWER for k in range(1, len(tensors) + 1)]
    return sum(count / sum(counts) * tensor.double() for count, tensor in zip(counts, tensors, strict=True))


# -- the arithmetic ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_k_counts_as_a_power_of_k(dtype):
    generator, mean = torch.Generator().manual_seed(1), RunningMean()
    seen = [[torch.randn(size, generator=generator).to(dtype) for size in ((3, 4), (5,))] for _ in range(20)]
    for number, tensors in enumerate(seen):
        before = [tensor.clone() for tensor in tensors]
        mean.add(10 + number, tensors)
        assert all(map(torch.equal, tensors, before)), "they are only read"
    for place, tensor in enumerate(mean.tensors):
        assert tensor.dtype == torch.float32
        assert torch.allclose(tensor.double(), weights_of([tensors[place] for tensors in seen]), atol=1e-6)
    assert (mean.steps, mean.first, mean.last) == (20, 10, 29)


def test_it_is_as_old_as_the_mean_of_the_last_third():
    mean = RunningMean()
    for step in range(1, 1001):
        mean.add(step, [torch.tensor([float(step)])])
    assert float(mean.tensors[0]) == pytest.approx(1000 - 1000 / 6, abs=2)


def test_the_first_step_and_steps_without_a_change_are_kept_bit_for_bit():
    tensor, mean = torch.randn(7), RunningMean()
    for step in range(9):
        mean.add(step, [tensor])
        assert torch.equal(mean.tensors[0], tensor) and mean.tensors[0] is not tensor


def test_a_mean_that_was_kept_goes_on_bit_for_bit():
    generator = torch.Generator().manual_seed(2)
    steps = [torch.randn(50, generator=generator) for _ in range(9)]
    whole, first = RunningMean(), RunningMean()
    for number, tensor in enumerate(steps):
        whole.add(number + 1, [tensor])
        if number < 4:
            first.add(number + 1, [tensor])
    second = RunningMean.from_state(first.as_state())
    second.on([steps[0]])
    for number, tensor in enumerate(steps[4:]):
        second.add(number + 5, [tensor])
    assert torch.equal(whole.tensors[0], second.tensors[0])
    assert (whole.steps, whole.first, whole.last) == (second.steps, second.first, second.last)


@pytest.mark.parametrize(
    "state", [{}, {"power": 3, "steps": 1, "first": 1, "last": 1, "tensors": [torch.ones(1)]}, {"power": "x"}]
)
def test_a_mean_that_is_none_is_refused(state):
    with pytest.raises(Refusal, match="cannot be used: .*Resume without --average"):
        RunningMean.from_state(state)


def test_a_mean_of_other_tensors_is_refused():
    mean = RunningMean()
    mean.add(1, [torch.ones(3)])
    with pytest.raises(Refusal, match="of other tensors than are trained here"):
        mean.on([torch.ones(4)])


# -- a training -------------------------------------------------------------------------------------------------------


@pytest.fixture
def steps(monkeypatch):
    """The trained tensors after each optimizer step of the newest training, as their own optimizer leaves them."""
    found = []
    step = torch.optim.AdamW.step

    def noted(optimizer, *args, **kwargs):
        result = step(optimizer, *args, **kwargs)
        found.append([weight.detach().clone() for group in optimizer.param_groups for weight in group["params"]])
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    return found


def saved(folder, kind):
    """The tensors and the facts of an adapter in a folder."""
    file = folder / ("adapter_model.safetensors" if kind == "lora" else "lokr_weights.safetensors")
    return load_file(file), read_json_object(folder / "training_config.json")


def own(folder, kind):
    return folder / "adapter" if kind == "lora" else folder


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_the_training_is_the_same_and_the_average_is_the_mean_of_its_steps(train, equal_bits, steps, kind):
    options = {"validate": 2, "validate_every": 1}
    plain = train("base", kind, options=options, max_epochs=3, **SETTINGS)
    steps.clear()
    averaged = train("base", kind, options=options | ON, max_epochs=3, **SETTINGS)
    assert equal_bits(plain, averaged)
    assert any(line.startswith("✅") for line in averaged.messages)
    for folder, name, count in (
        (next(averaged.output.glob("checkpoints/epoch_1*")), "epoch 1", 1),
        (averaged.output / "final", "final", 3),
    ):
        tensors, facts = saved(folder / "average", kind)
        adapter, of_adapter = saved(own(folder, kind), kind)
        assert tensors.keys() == adapter.keys(), name
        made = len(steps) * count // 3
        assert facts["average_steps"] == made
        assert facts["average_of"] == f"the weights after optimizer steps 1 to {made}, step k counted as k^4"
        assert "average_of" not in of_adapter and "average_steps" not in of_adapter
        assert (facts["rank"], facts["alpha"]) == (of_adapter["rank"], of_adapter["alpha"])
        if kind == "lora":  # in PEFT's order, which is that of the optimizer
            rounded = next(iter(tensors.values())).dtype
            expected = [weights_of(list(values)).to(rounded) for values in zip(*steps[:made], strict=True)]
            by_size = sorted(expected, key=lambda tensor: (tensor.shape, tensor.flatten().tolist()))
            found = sorted(tensors.values(), key=lambda tensor: (tensor.shape, tensor.flatten().tolist()))
            # The first versions train and save in bf16; the mean is made in fp32 and rounded once.
            rounding = 2.0**-8 if found[0].dtype == torch.bfloat16 else 0.0
            for mean, exact in zip(found, by_size, strict=True):
                assert torch.allclose(mean, exact, rtol=rounding, atol=1e-6), name
    changed = [not torch.equal(tensors[name], adapter[name]) for name in tensors if "alpha" not in name]
    assert any(changed), "the mean is not the newest adapter"
    of_plain = read_json_object(own(plain.output / "final", kind) / "training_config.json")
    assert {**of_plain, "created": 0} == {**of_adapter, "created": 0}
    assert not [*plain.output.rglob("average")]


def test_without_lightning_it_is_the_same_bit_for_bit(train, trainer, equal_bits, monkeypatch):
    monkeypatch.setattr(trainer, "LIGHTNING_AVAILABLE", False)
    plain = train("base", **SETTINGS)
    if not plain.tensors:
        pytest.skip("this version of ACE-Step cannot train without Lightning here")
    averaged = train("base", options=ON, **SETTINGS)
    assert equal_bits(plain, averaged) and (averaged.output / "final" / "average").is_dir()


class Stopper:
    """Presses upstream's stop button in a step."""

    def __init__(self, step):
        self.left = step

    @hookimpl
    def acestep_step_finished(self, step):
        self.left -= step.training
        if self.left == 0:
            running_training.get().state["should_stop"] = True


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", pytest.param("lokr", marks=pytest.mark.slow)])
def test_a_resumed_training_has_the_average_of_an_unbroken_one(train, kind):
    """It was saved within an epoch, right behind an optimizer step that no training step had followed yet."""
    whole = train("base", kind, options=ON, max_epochs=3, **SETTINGS)
    stopped = train("base", kind, options=ON, max_epochs=3, extra_plugins={"stops": Stopper(10)}, **SETTINGS)
    folder = stopped.output / "interrupted"
    point = read_checkpoint(folder).point
    one, facts = saved(whole.output / "final" / "average", kind)
    made = 3 if facts["average_steps"] == 6 else 2  # the first versions carry an epoch's rest over, without a step
    assert (point.epochs, point.steps, point.kept["average"]["steps"]) == (1, 4, made)
    resumed = train("base", kind, options=ON, max_epochs=3, resume_from=str(folder), **SETTINGS)
    other, of_resumed = saved(resumed.output / "final" / "average", kind)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert facts["average_of"] == of_resumed["average_of"]
    assert (folder / "average").is_dir(), "it is beside every adapter"


def test_it_begins_where_a_checkpoint_has_none(train, steps, capsys):
    first = train("base", max_epochs=1, **SETTINGS)
    made = len(steps)  # 2, or 1 where the rest of an epoch is carried over
    capsys.readouterr()
    (checkpoint,) = first.output.glob("checkpoints/epoch_1*")
    second = train("base", options=ON, resume_from=str(checkpoint), **SETTINGS)
    assert "Note: the average begins here: the checkpoint has none." in capsys.readouterr().out
    _, facts = saved(second.output / "final" / "average", "lora")
    assert facts["average_of"].startswith(f"the weights after optimizer steps {made + 1} to {made + 2},")
    (checkpoint,) = second.output.glob("checkpoints/epoch_2*")
    third = train("base", max_epochs=3, resume_from=str(checkpoint), **SETTINGS)
    assert "Note: the checkpoint's average ends here: this run is without --average." in capsys.readouterr().out
    assert not (third.output / "final" / "average").exists()


@pytest.fixture
def judged(monkeypatch):
    """Losses that are put in place of the measured ones: ``judged[epoch, name] = loss``, "" for the adapter."""
    from sidestep_plugin.validation.history import History

    planned, judge = {}, History.judge

    def planted(history, validation):
        measured = {"": validation.losses, **validation.variants}
        for name, losses in measured.items():
            if (validation.epoch, name) in planned:
                losses.fill_(planned[validation.epoch, name])
        return judge(history, validation)

    monkeypatch.setattr(History, "judge", planted)
    return planned


@pytest.mark.slow
def test_the_average_is_validated_in_the_same_line_and_can_be_the_best(train, judged, capsys):
    judged |= {(0, ""): 1.0, (1, ""): 0.9, (1, "average"): 0.5, (2, ""): 0.8, (2, "average"): 0.6}
    result = train("base", options=ON | {"validate": 2, "validate_every": 1}, **SETTINGS)
    said = capsys.readouterr().out + "\n".join(result.messages)
    assert (
        "Validation after epoch 1: loss 0.9000 (-10.00 % vs. no adapter, average -50.00 %), lower at 8 of 8 timesteps; "
        "the best so far (average)\n" in said
    )
    assert (
        "(-20.00 % vs. no adapter, average -40.00 %), lower at 8 of 8 timesteps; best: epoch 1 (average) (-50.00 %)"
        in said
    )
    assert (
        "Validation: best epoch 1 (average), loss 0.5000 (-50.00 % vs. no adapter), in checkpoints/best/average" in said
    )
    best = result.output / "checkpoints" / "best"
    _, facts = saved(best / "average", "lora")
    assert (facts["validation_epoch"], facts["validation_loss"], facts["validation_change"]) == (1, 0.5, -0.5)
    _, facts = saved(best / "adapter", "lora")
    assert facts["validation_loss"] == 0.9
    report = read_json_object(result.output / "training_report.json")["validation"]
    assert (report["best_epoch"], report["best_variant"], report["best_in"]) == (
        1,
        "average",
        "checkpoints/best/average",
    )
    assert report["epochs"][1]["variants"] == {"average": {"loss": 0.5, "change": -0.5}}
    page = (result.output / "index.html").read_text(encoding="utf-8")
    assert "<th>average</th>" in page and "−40.00 %" in page and "checkpoints/best/average" in page
    final = next(entry for entry in saved_in(result.output) if entry.name == "final")
    assert final.validation_change == -0.2 and (final.average, final.average_change) == ("final/average", -0.4)
    resumed = train("base", options=ON | {"validate": 2, "validate_every": 1}, resume_from=str(best), **SETTINGS)
    assert any("best: epoch 1 (average) (-50.00 %)" in line for line in capsys.readouterr().out.splitlines()), resumed


@pytest.mark.slow
def test_patience_leaves_the_average_of_the_best_epoch(train, judged, capsys):
    judged |= {(0, ""): 1.0, **{(epoch, name): 0.9 for epoch in (1, 2, 3) for name in ("", "average")}}
    judged |= {(2, "average"): 0.4}
    options = ON | {"validate": 2, "validate_every": 1, "patience": 1}
    result = train("base", options=options, max_epochs=6, **SETTINGS)
    assert any(
        "final is the best adapter, of epoch 2 (its average in final/average)" in line for line in result.messages
    )
    for name in ("adapter", "average"):
        final, facts = saved(result.output / "final" / name, "lora")
        best, of_best = saved(result.output / "checkpoints" / "best" / name, "lora")
        assert final.keys() == best.keys() and all(torch.equal(final[key], best[key]) for key in final)
        assert facts["validation_epoch"] == of_best["validation_epoch"] == 2
    assert facts["average_of"] == of_best["average_of"] and facts["average_steps"] == 2


def test_an_average_that_cannot_be_saved_is_told_and_the_adapter_is_saved(train, trainer, monkeypatch, capsys):
    save = trainer.save_lora_weights

    def fails(model, output_dir):
        if str(output_dir).endswith("average"):
            raise OSError(28, "No space left on device")
        return save(model, output_dir)

    monkeypatch.setattr(trainer, "save_lora_weights", fails)
    result = train("base", options=ON, max_epochs=1, **SETTINGS)
    said = capsys.readouterr().out
    assert said.count("average could not be saved: [Errno 28] No space left on device.") == 2
    assert any(line.startswith("✅") for line in result.messages)
    assert (result.output / "final" / "adapter" / "training_config.json").is_file()
    assert not [*result.output.rglob("average")]


def test_a_trainer_whose_optimizer_is_unknown_is_refused(monkeypatch):
    from sidestep_plugin.averaging.plugin import _Averaging

    run = SimpleNamespace(engine=SimpleNamespace(trained=[]))
    with pytest.raises(Refusal, match="Leave --average out, and average saved checkpoints"):
        _Averaging(run, RunningMean()).begin()


# -- its folder -------------------------------------------------------------------------------------------------------


def test_a_save_without_an_average_leaves_none_of_an_older_one(tmp_path):
    folder = tmp_path / "best"
    for names in (["adapter", "average"], ["adapter"]):
        with staged(folder) as stage:
            for name in names:
                (stage / name).mkdir()
                (stage / name / "adapter_model.safetensors").write_text("weights")
                (stage / name / "README.md").write_text("card")
            with published(stage, folder):
                pass
        (folder / "notes.txt").write_text("mine")
    assert sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()) == [
        "adapter/README.md",
        "adapter/adapter_model.safetensors",
        "notes.txt",
    ]
    (folder / "average").mkdir()
    (folder / "average" / "lokr_weights.safetensors").write_text("weights")
    remove_save(folder)
    assert [file.name for file in folder.iterdir()] == ["notes.txt"]


def test_a_folder_is_its_adapter_and_not_its_average(tmp_path):
    """A LoKr lies in the folder itself, and "average" comes before its name."""
    folder = tmp_path / "final"
    (folder / "average").mkdir(parents=True)
    for place, epoch in ((folder, 7), (folder / "average", 3)):
        (place / "lokr_weights.safetensors").write_bytes(b"weights")
        (place / "training_config.json").write_text(json.dumps({"epoch": epoch}), encoding="utf-8")
    (entry,) = saved_in(tmp_path)
    assert (entry.epoch, entry.average) == (7, "final/average")
