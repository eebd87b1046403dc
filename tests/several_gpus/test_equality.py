"""Two processes train what one process trains with twice the gradient accumulation, bit for bit.

All trainings of this file run one after the other in the same two processes, which are started once.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from several_gpus import job
from several_gpus.processes import done

KINDS = ("lora", "lokr")
INJECTED = {"inject": True, "ordered": True, "songs": 6, "options": {"cfg_ratio": 0.0, "average": True}}
PLAIN = {"dropout": 0.1, "options": {"cfg_ratio": 0.5}}

pytestmark = pytest.mark.slow  # one training in two processes serves all of them


@pytest.fixture(scope="module")
def base(checkout):
    """What every job needs to know of the checkout."""
    return {
        "root": str(checkout.root),
        "checkpoints": str(checkout.checkpoints),
        "tensors": str(checkout.tensors),
        "real": checkout.real,
        "model": "base",
    }


@pytest.fixture(scope="module")
def kinds(trainer):
    from sidestep_plugin.engine.shapes import adapter_types

    return [kind for kind in KINDS if kind in adapter_types(trainer)]


@pytest.fixture(scope="module")
def two(base, kinds, tmp_path_factory):
    """What each of two processes saw of several trainings, by name, with the folder of each."""
    folder = tmp_path_factory.mktemp("two")
    jobs = {kind: INJECTED | {"kind": kind} for kind in kinds}
    jobs["plain"] = PLAIN
    jobs["stopped"] = PLAIN | {"stop": [1, 5]}
    jobs["resumed"] = PLAIN | {"resume_from": str(folder / str(len(jobs) - 1) / "output" / "interrupted")}
    looked_at = {"validate": 2, "validate_every": 1, "preview_every": 1, "preview_seconds": 0.2}
    jobs["looked at"] = PLAIN | {"options": PLAIN["options"] | looked_at}
    jobs["not looked at"] = PLAIN | {"options": PLAIN["options"] | {"validate": 2, "validate_every": 100}}
    patient = {"validate": 2, "validate_every": 1, "patience": 1}
    jobs["patient"] = {"options": patient, "settings": {"learning_rate": 0.0, "max_epochs": 6}}
    of_epoch_1 = str(folder / str(list(jobs).index("looked at")) / "output" / "checkpoints" / "epoch_1*")
    still = {"learning_rate": 0.0, "max_epochs": 6}
    jobs["branched"] = PLAIN | {"resume_from": of_epoch_1, "options": PLAIN["options"] | patient, "settings": still}
    jobs["no room"] = {"options": patient, "settings": {"max_epochs": 2}, "no_room": True}
    jobs["other seed"] = PLAIN | {"settings": {"seed": 20, "max_epochs": 1}}
    seen = done(folder, [base | one for one in jobs.values()], 2)
    return {
        name: (*processes, folder / str(number) / "output")
        for number, (name, processes) in enumerate(zip(jobs, seen, strict=True))
    }


@pytest.fixture(scope="module")
def alone(base, kinds, trainer, tmp_path_factory):
    """The same trainings in this process, with twice the accumulation."""
    folder, twice = tmp_path_factory.mktemp("alone"), {"settings": {"gradient_accumulation_steps": 2}}
    return {
        kind: (job.train(trainer, base | INJECTED | twice | {"kind": kind}, folder / kind), folder / kind / "output")
        for kind in kinds
    }


def schedule(output):
    """The learning rate after each epoch, from the checkpoints."""
    states = [
        torch.load(next(output.glob(f"checkpoints/epoch_{epoch}*/training_state.pt")), weights_only=False)
        for epoch in (1, 2, 3)
    ]
    return [state["scheduler_state_dict"]["_last_lr"] for state in states]


def adapter(output, *, average=False):
    (file,) = (file for file in output.glob("final/**/*.safetensors") if (file.parent.name == "average") == average)
    return load_file(file)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_are_one_with_twice_the_accumulation(two, alone, kind, require_kind):
    require_kind(kind)
    (one, place), (first, second, output) = alone[kind], two[kind]
    assert one["weights"] and one["weights"] == first["weights"] == second["weights"]
    ours, its = adapter(output), adapter(place)
    assert ours.keys() == its.keys() and all(torch.equal(ours[name], its[name]) for name in ours)
    averages = [adapter(folder, average=True) for folder in (output, place)]
    assert all(torch.equal(averages[0][name], averages[1][name]) for name in averages[0])
    assert first["losses"] == one["losses"][0::2] and second["losses"] == one["losses"][1::2]
    assert schedule(output) == schedule(place)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_equal_after_every_backward_pass(two, alone, kind, require_kind):
    require_kind(kind)
    (one, _), (first, second, _) = alone[kind], two[kind]
    assert len(first["gradients"]) == 9 and all(first["gradients"])
    assert first["gradients"] == second["gradients"] == one["gradients"][1::2]


def test_random_numbers_differ_and_songs_are_divided(two):
    first, second, _ = two["plain"]
    assert not set(first["began"]) & set(second["began"])
    assert not set(map(tuple, first["t"])) & set(map(tuple, second["t"]))
    assert first["dropped"] != second["dropped"] and sum(first["dropped"] + second["dropped"]) > 0
    for epoch in range(3):
        mine, its = (set(seen["songs"][3 * epoch : 3 * epoch + 3]) for seen in (first, second))
        assert len(mine) == len(its) == 3 and not mine & its
    orders = [first["songs"][:3], first["songs"][3:6], first["songs"][6:], two["other seed"][0]["songs"]]
    assert len({tuple(order) for order in orders}) == 4, "another order in each epoch, and for another seed"


def test_one_process_speaks_and_saves(two):
    first, second, output = two["plain"]
    assert not second["said"] and second["ended"] == 0 and first["ended"] == 1
    said = "\n".join(first["said"])
    assert "batch 1 x accumulation 1 x 2 devices = 2 songs for each optimizer step" in said
    assert "3 per epoch on each device, where one device takes 6" in said and "9 optimizer steps (3 per epoch)" in said
    names = sorted(place.name.split("_loss")[0] for place in (output / "checkpoints").iterdir())
    assert names == ["epoch_1", "epoch_2", "epoch_3"]
    facts = json.loads(next(output.glob("final/**/training_config.json")).read_text(encoding="utf-8"))
    assert facts["processes"] == 2 and facts["training_steps"] == 9


def test_the_report_is_about_all_processes(two):
    first, second, output = two["plain"]
    report = json.loads((output / "training_report.json").read_text(encoding="utf-8"))
    assert report["rows"] == 18 and report["rows_without_condition"] == sum(first["dropped"] + second["dropped"])
    means = [(one + other) / 2 for one, other in zip(first["losses"], second["losses"], strict=True)]
    for epoch, entry in enumerate(report["loss_by_epoch"]):
        assert entry["loss"] == pytest.approx(sum(means[3 * epoch : 3 * epoch + 3]) / 3, abs=1e-5)
    assert first["epochs"] == second["epochs"] == pytest.approx([entry["loss"] for entry in report["loss_by_epoch"]])


def test_a_stop_in_one_process_ends_all_after_the_same_step(two):
    first, second, output = two["stopped"]
    assert first["steps"] == second["steps"] == 5
    assert sum("Saved as it was" in text for text in first["messages"]) == 1
    assert any(text.startswith("Stopping after this step") for text in first["said"])
    assert (output / "interrupted" / "resume_state.pt").is_file() and not (output / "final").exists()


def test_resuming_with_as_many_processes_equals_going_through(two):
    """Also when the stop came in the middle of an epoch: random states of both are in the checkpoint."""
    whole, resumed = two["plain"], two["resumed"]
    assert resumed[0]["steps"] == resumed[1]["steps"] == 4, resumed[0]["messages"]
    for there, then in zip(resumed[:2], whole[:2], strict=True):
        assert there["weights"] == then["weights"] and torch.equal(there["random"], then["random"])
    ours, its = adapter(resumed[2]), adapter(whole[2])
    assert all(torch.equal(ours[name], its[name]) for name in its)
    reports = [
        json.loads((place[2] / "training_report.json").read_text(encoding="utf-8")) for place in (whole, resumed)
    ]
    assert reports[0]["loss_by_epoch"] == reports[1]["loss_by_epoch"]


def test_validation_and_previews_change_nothing(two):
    """All processes validate and judge the numbers of the first one, which makes the clips."""
    (first, second, output), (one, other, place) = two["looked at"], two["not looked at"]
    assert first["weights"] == second["weights"] == one["weights"] == other["weights"]
    assert torch.equal(first["random"], one["random"]) and torch.equal(second["random"], other["random"])
    ours, its = adapter(output), adapter(place)
    assert ours.keys() == its.keys() and all(torch.equal(ours[name], its[name]) for name in ours)
    report = json.loads((output / "training_report.json").read_text(encoding="utf-8"))["validation"]
    assert [entry["epoch"] for entry in report["epochs"]] == [0, 1, 2, 3]
    assert (output / "checkpoints" / "best" / "resume_state.pt").is_file()
    assert sorted(folder.name for folder in (output / "previews").iterdir() if folder.is_dir()) == [
        "base_model",
        "epoch_1",
        "epoch_2",
        "epoch_3",
    ]
    assert sum("Previews: " in line and "clips in" in line for line in first["said"]) == 1


def test_patience_ends_all_processes_after_the_same_step(two):
    first, second, output = two["patient"]
    assert first["steps"] == second["steps"] == 4, "two epochs of two steps: the second one was not better"
    assert adapter(output)
    assert sum("final is the best adapter, of epoch 1" in text for text in first["messages"]) == 1


def test_another_course_of_a_training_has_its_own_best_adapter(two):
    """The first process looks for it, and all judge alike. Its folder becomes a copy of the checkpoint."""
    first, second, output = two["branched"]
    assert first["steps"] == second["steps"] == 2, "epoch 2 was not better than epoch 1"
    assert sum("final is the best adapter, of epoch 1" in text for text in first["messages"]) == 1, first["messages"]
    assert sum("checkpoints/best is a copy of" in line for line in first["said"]) == 1
    (before,) = (two["looked at"][2] / "checkpoints").glob("epoch_1*")
    ours, its = adapter(output), load_file(next(before.rglob("*.safetensors")))
    assert ours.keys() == its.keys() and all(torch.equal(ours[name], its[name]) for name in ours)


def test_a_best_adapter_that_cannot_be_saved_stops_no_process(two):
    first, second, output = two["no room"]
    assert first["steps"] == second["steps"] == 4 and first["weights"] == second["weights"]
    assert not (output / "checkpoints" / "best").exists() and adapter(output)
    assert any("its adapter is in no checkpoint" in text for text in first["messages"])
