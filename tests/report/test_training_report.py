"""What is summed up of a training is what its decoder was given and what its steps returned."""

from __future__ import annotations

import json

import pytest
import torch

from sidestep_plugin.report.plugin import BANDS
from sidestep_plugin.timesteps.schedule import inference_timesteps

KINDS = ("lora", "lokr")


def report_of(done):
    text = (done.output / "training_report.json").read_text(encoding="utf-8")
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["base", "turbo"])
def test_the_report_is_what_happened(train, load, model, kind):
    handler = load(model)
    null = handler.model.null_condition_emb.detach()[0]
    done = train(model, kind, handler=handler, max_epochs=4, options={"cfg_ratio": 0.5})
    report = report_of(done)
    assert (report["ending"], report["model_variant"], report["adapter_type"]) == ("finished", model, kind)
    assert report["training_steps"] == report["steps_of_this_run"] == len(done.losses) == 12
    for number, entry in enumerate(report["loss_by_epoch"]):
        mean = sum(done.losses[3 * number : 3 * number + 3]) / 3
        assert entry == {"epoch": number + 1, "loss": pytest.approx(mean, abs=1e-5)}
    # By band: what the decoder was given, and the loss of the step that it was given in.
    rows, losses = [0] * BANDS, [0.0] * BANDS
    for times, loss in zip(done.timesteps, done.losses, strict=True):
        for t in times.float().tolist():
            # Some versions round what they give the decoder to bf16, across the edge of a band.
            t = min(inference_timesteps(3.0, 8), key=lambda step, t=t: abs(step - t)) if model == "turbo" else t
            band = min(int(t * BANDS + 1e-6), BANDS - 1)
            rows[band], losses[band] = rows[band] + 1, losses[band] + loss
    assert [entry["rows"] for entry in report["loss_by_t"]] == rows and report["rows"] == sum(rows)
    for entry, count, total in zip(report["loss_by_t"], rows, losses, strict=True):
        assert entry["loss"] == (pytest.approx(total / count, abs=1e-5) if count else None)
    dropped = sum(
        torch.equal(row.float(), null.to(row.dtype).float().expand_as(row)) for rows in done.conditions for row in rows
    )
    assert report["rows_without_condition"] == dropped and (dropped > 0) == (model == "base")
    assert report["seconds_per_step"] > 0


@pytest.mark.parametrize("epochs", [1, 2])
def test_it_is_said_before_upstreams_last_word(train, epochs):
    done = train("base", max_epochs=epochs)
    (said,) = [line for line in done.messages if line.startswith("Loss: ")]
    assert said.count("mean of epoch") == epochs and "rows without their prompt" in said and "s per step" in said
    assert any(line.startswith("Loss by t: ") for line in done.messages)
    assert done.messages[-1].startswith("✅ Training complete") and "Report: " in done.messages[-2]


def test_no_line_of_it_is_a_local_path(train, tmp_path):
    text = (train("base").output / "training_report.json").read_text(encoding="utf-8")
    assert str(tmp_path) not in text and "/" not in text


def test_tensorboard_gets_the_histogram_of_t_and_the_loss_by_band(train, trainer):
    if not getattr(trainer, "LIGHTNING_AVAILABLE", False):
        pytest.skip("ACE-Step logs with Lightning only: pip install 'sidestep-plugin[upstream]'")
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    done = train("base", max_epochs=3)
    (folder,) = (done.output / "logs").iterdir()
    events = event_accumulator.EventAccumulator(str(folder), size_guidance={"histograms": 0})
    events.Reload()
    histograms = events.Histograms("train/t")
    assert [entry.step for entry in histograms] == [1, 2, 3]
    assert sum(entry.histogram_value.num for entry in histograms) == sum(len(t) for t in done.timesteps)
    bands = [tag for tag in events.Tags()["scalars"] if tag.startswith("train/loss at t ")]
    assert bands and "train/loss" in events.Tags()["scalars"]


@pytest.mark.slow
def test_a_resumed_training_reports_the_epochs_before_it(train):
    first = train("base", max_epochs=2)
    (checkpoint,) = (first.output / "checkpoints").glob("epoch_2*")
    again = train("base", max_epochs=4, resume_from=str(checkpoint), output_dir=str(first.output))
    assert again.config.max_epochs == 4
    text = json.loads((first.output / "training_report.json").read_text(encoding="utf-8"))
    assert [entry["epoch"] for entry in text["loss_by_epoch"]] == [1, 2, 3, 4]
    assert (text["training_steps"], text["steps_of_this_run"]) == (12, 6)


@pytest.mark.slow
def test_it_keeps_every_epoch_whatever_lies_there_and_however_often_it_was_stopped(train):
    first = train("base", max_epochs=3)
    (first.output / "training_report.json").write_text('{"loss_by_epoch": [{"epoch": 1e400}]}', encoding="utf-8")
    (checkpoint,) = (first.output / "checkpoints").glob("epoch_2*")
    again = train("base", max_epochs=5, resume_from=str(checkpoint))  # into another folder
    entries = report_of(again)["loss_by_epoch"]
    assert [entry["epoch"] for entry in entries] == [1, 2, 3, 4, 5]
    for number, entry in enumerate(entries[:2]):
        assert entry["loss"] == pytest.approx(sum(first.losses[3 * number : 3 * number + 3]) / 3, abs=1e-5)


def test_a_report_that_cannot_be_written_costs_no_adapter(train, monkeypatch):
    from sidestep_plugin.report import plugin as training_report

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training_report, "replacing", full)
    done = train("base")
    assert done.tensors and any("no report could be written" in line for line in done.messages)


@pytest.mark.slow
def test_an_older_report_does_not_pass_for_that_of_this_training(train, monkeypatch):
    from sidestep_plugin.report import plugin as training_report

    def full(file):
        file.write_text('{"validation": {"best_in": "checkpoints/best"}}', encoding="utf-8")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training_report, "replacing", full)
    assert not (train("base").output / training_report.FILE_NAME).exists()


def test_steps_fetch_nothing_from_the_device(train, monkeypatch):
    """Values are looked at once an epoch: here the looking is counted."""
    from sidestep_plugin.report import plugin as training_report

    calls = []
    count = training_report._count
    monkeypatch.setattr(training_report, "_count", lambda *given: calls.append(1) or count(*given))
    done = train("base", max_epochs=3)
    assert len(done.losses) == 9 and len(calls) == 4  # three epochs, and the end
