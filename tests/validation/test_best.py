"""What is said of ``best``, ``final`` and "finished" is true of the files, whatever happened to the training before."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from sidestep_plugin import hookimpl
from sidestep_plugin.cli import cli, quiet
from sidestep_plugin.report.page import read_page
from sidestep_plugin.resuming.checkpoints import newest_checkpoint, read_checkpoint
from sidestep_plugin.resuming.overview import saved_in
from sidestep_plugin.songs.dataset import songs_in
from sidestep_plugin.validation.held_out import choose

HELD_OUT = {"validate": 2, "validate_every": 1}


def weights_in(folder):
    (file,) = folder.rglob("*.safetensors")
    return load_file(file)


def same(one, other):
    one, other = weights_in(one), weights_in(other)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def facts_in(folder):
    return json.loads(next(folder.rglob("training_config.json")).read_text(encoding="utf-8"))


def checkpoint(output, epoch):
    (found,) = (place for place in (output / "checkpoints").iterdir() if re.match(rf"epoch_{epoch}(_|$)", place.name))
    return found


@pytest.fixture
def no_room_for_best(monkeypatch):
    """Let the disk be full when ``best`` is to be saved, while the set that is returned holds "full"."""
    from contextlib import contextmanager

    from sidestep_plugin.engine.wrappers import saving

    staged, full = saving.staged, {"full"}

    @contextmanager
    def failing(folder):
        if folder.name == "best" and full:
            raise OSError(28, "No space left on device")
        with staged(folder) as stage:
            yield stage

    monkeypatch.setattr(saving, "staged", failing)
    return full


class AfterEpoch:
    """A plugin that does something when the last step of an epoch is done."""

    def __init__(self, does):
        self.does = does

    @hookimpl
    def acestep_epoch_finished(self, epoch):
        self.does(epoch)


# -- another course of the same training -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", pytest.param("lokr", marks=pytest.mark.slow)])
def test_patience_takes_the_best_of_this_course_and_not_of_one_that_was_left(train, kind, monkeypatch, capsys):
    """Best was epoch 4. From epoch 2 on another course is taken, in which everything gets worse."""
    from sidestep_plugin.engine import services

    whole = train("base", kind, options=HELD_OUT, max_epochs=4)
    output = whole.output
    assert read_checkpoint(output / "checkpoints" / "best").point.epochs == 4
    abandoned, evaluate = weights_in(output / "checkpoints" / "best"), services.evaluate
    monkeypatch.setattr(services, "evaluate", lambda *given, **more: evaluate(*given, **more) * 2.0)
    settings = {"output_dir": str(output), "max_epochs": 9, "learning_rate": 0.5}
    options = HELD_OUT | {"patience": 2}
    left = train("base", kind, options=options, resume_from=str(checkpoint(output, 2)), **settings)
    said = "\n".join([*left.messages, capsys.readouterr().out])
    assert "final is the best adapter, of epoch 2" in said, said
    assert "checkpoints/best is a copy of" in said and "best epoch 2, loss" in said and "in checkpoints/best" in said
    assert same(output / "final", output / "checkpoints" / "best")
    final = weights_in(output / "final")
    assert same(output / "final", checkpoint(output, 2)) and not all(torch.equal(final[k], abandoned[k]) for k in final)
    facts = facts_in(output / "final")
    assert (facts["epoch"], facts["validation_epoch"], facts["training_steps"]) == (2, 2, 4)
    assert facts["learning_rate"] == 1e-2 and facts["max_epochs"] == 4, "it was trained with the settings of then"
    assert facts == facts_in(output / "checkpoints" / "best") | {"created": facts["created"]}
    by_name = {entry.name: entry.epoch for entry in saved_in(output)}
    assert by_name["final"] == by_name["checkpoints/best"] == 2


@pytest.mark.slow
def test_a_best_adapter_that_is_nowhere_is_not_spoken_of(train, capsys):
    """Neither best nor a checkpoint of its epoch is left: the best of what can be had counts."""
    output = train("base", options=HELD_OUT, max_epochs=2, save_every_n_epochs=2).output
    shutil.rmtree(output / "checkpoints" / "best")
    (output / "checkpoints" / "best").mkdir()
    resumed_from = checkpoint(output, 2).rename(output / "checkpoints" / "kept")
    state = torch.load(resumed_from / "resume_state.pt", weights_only=True)
    state["held_out"]["losses"][1] = state["held_out"]["losses"][2] * 0.5  # so epoch 1 was the best
    torch.save(state, resumed_from / "resume_state.pt")
    capsys.readouterr()
    done = train("base", options=HELD_OUT, max_epochs=3, resume_from=str(resumed_from), output_dir=str(output))
    said = "\n".join([*done.messages, capsys.readouterr().out])
    assert "the adapter of epoch 1, the best of this training so far, is in no checkpoint any more. Now epoch 2" in said
    assert "Validation: best epoch 3" in said and read_checkpoint(output / "checkpoints" / "best").point.epochs == 3


@pytest.mark.slow
def test_another_output_folder_gets_the_best_adapter_too(train, overfitting, tmp_path, capsys):
    options = {"validate": 4, "validate_every": 1, "patience": 3}
    settings = {"tensors": overfitting, "max_epochs": 40, "learning_rate": 3e-3}
    first = train("base", options=options | {"patience": None}, **settings | {"max_epochs": 14})
    point = read_checkpoint(first.output / "checkpoints" / "best").point
    newest = read_checkpoint(checkpoint(first.output, 14)).point
    assert point.epochs < 12, "it overfits early"
    elsewhere = tmp_path / "elsewhere"
    later = checkpoint(first.output, point.epochs + 1)
    done = train("base", options=options, resume_from=str(later), output_dir=str(elsewhere), **settings)
    said = "\n".join([*done.messages, capsys.readouterr().out])
    assert f"final is the best adapter, of epoch {point.epochs}" in said
    assert same(elsewhere / "final", first.output / "checkpoints" / "best")
    assert same(elsewhere / "final", elsewhere / "checkpoints" / "best")
    found, _ = newest_checkpoint(elsewhere)
    assert read_checkpoint(found).point.epochs == point.epochs + 3, "and the copy is not taken for the newest"
    assert newest.save_number > 0


# -- a best adapter that could not be saved --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", pytest.param("lokr", marks=pytest.mark.slow)])
def test_a_best_adapter_that_could_not_be_saved_is_saved_later(
    train, overfitting, no_room_for_best, equal_bits, capsys, kind
):
    """Its epoch has no checkpoint of its own. The training is the same bit for bit, and can be resumed from it."""
    options = {"validate": 4, "validate_every": 1, "patience": 4}
    settings = {"tensors": overfitting, "max_epochs": 40, "learning_rate": 3e-3, "save_every_n_epochs": 100}
    no_room_for_best.clear()
    expected = train("base", kind, options=options, **settings)
    best = read_checkpoint(expected.output / "checkpoints" / "best").point
    no_room_for_best.add("full")
    again = AfterEpoch(lambda epoch: no_room_for_best.clear() if epoch == best.epochs + 2 else None)
    capsys.readouterr()
    done = train("base", kind, options=options, extra_plugins={"again": again}, **settings)
    out = capsys.readouterr().out
    assert "best could not be saved" in out and "The training goes on." in out
    assert f"the best adapter so far, of epoch {best.epochs}, is in checkpoints/best now" in out
    assert equal_bits(expected, done), "and final is the best adapter"
    folder = done.output / "checkpoints" / "best"
    found = read_checkpoint(folder).point
    assert (found.epochs, found.steps, found.steps_done) == (best.epochs, 0, best.steps_done)
    assert sorted(found.kept["held_out"]["losses"]) == list(range(best.epochs + 1)), "nothing of later epochs"
    assert torch.equal(found.losses, best.losses) and torch.equal(found.random["torch"], best.random["torch"])
    for key, value in best.optimizer["state"][0].items():
        assert torch.equal(torch.as_tensor(found.optimizer["state"][0][key]), torch.as_tensor(value))
    named = ("epoch", "validation_epoch", "validation_loss", "training_steps", "global_step")
    facts, wanted = facts_in(folder), facts_in(expected.output / "checkpoints" / "best")
    assert {name: facts[name] for name in named} == {name: wanted[name] for name in named}


@pytest.mark.slow
def test_patience_takes_the_best_adapter_though_it_was_never_saved(train, overfitting, no_room_for_best, capsys):
    options = {"validate": 4, "validate_every": 1, "patience": 2}
    settings = {"tensors": overfitting, "max_epochs": 40, "learning_rate": 3e-3, "save_every_n_epochs": 100}
    done = train("base", options=options, **settings)
    said = "\n".join(done.messages)
    (epoch,) = re.findall(r"final is the best adapter, of epoch (\d+)", said)
    assert f"best epoch {epoch}, loss" in said and "its adapter is in no checkpoint" in said
    report = json.loads((done.output / "training_report.json").read_text(encoding="utf-8"))["validation"]
    assert report["best_epoch"] == int(epoch) and report["best_in"] is None
    assert "in checkpoints/best" not in said and not (done.output / "checkpoints" / "best").exists()
    assert facts_in(done.output / "final")["validation_epoch"] == int(epoch)
    no_room_for_best.clear()
    expected = train("base", options=options, **settings)
    assert same(done.output / "final", expected.output / "final")


# -- a training that patience has ended ------------------------------------------------------------------------------


@pytest.fixture
def run(checkout, trainer, overfitting, tmp_path, monkeypatch):
    """Run ``acestep-train`` in this process on songs that it overfits."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quiet, "quiet_upstream", lambda: None)

    def invoke(*more):
        line = ["--plugin=sidestep", "--model=base", "--dataset-dir", overfitting, "--output-dir", tmp_path / "output"]
        line += ["--acestep-root", checkout.root, "--checkpoint-dir", checkout.checkpoints, "--device=cpu"]
        line += ["--rank=4", "--alpha=8", "--batch-size=1", "--learning-rate=3e-3", "--epochs=30", "--validate=4"]
        return CliRunner().invoke(cli, [*map(str, [*line, "--validate-every=1", *more])], catch_exceptions=False)

    return invoke


@pytest.mark.slow
def test_resuming_a_training_that_patience_has_ended_changes_nothing(run, tmp_path):
    output = tmp_path / "output"
    first = run("--patience=2", "--save-every=1")
    assert first.exit_code == 0 and "so the training stops here" in first.output, first.output
    before = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    for patience in (2, 1):
        again = run(f"--patience={patience}", "--save-every=1", "--resume-from=latest")
        assert again.exit_code == 0, again.output
        assert re.search(rf"--patience {patience} has ended this training after \d+ of 30 epochs", again.output)
        assert "nothing was changed" in again.output and "more than --patience 2, or leave it out" in again.output
        assert {file: file.read_bytes() for file in output.rglob("*") if file.is_file()} == before
    texts = [
        next((output / place).rglob("training_options.toml")).read_text() for place in ("final", "checkpoints/best")
    ]
    assert texts[0] == texts[1] and "patience = 2" in texts[0]
    epochs = int(re.search(r"after (\d+) of 30", again.output)[1])
    on = run("--patience=3", "--save-every=1", "--resume-from=latest")
    assert on.exit_code == 0 and f"Validation after epoch {epochs + 1}" in on.output, on.output
    assert f"Validation after epoch {epochs}:" not in on.output


@pytest.mark.slow
def test_a_training_that_was_killed_when_patience_had_ended_it_is_finished_at_once(train, overfitting, capsys):
    options = {"validate": 4, "validate_every": 1, "patience": 2}
    settings = {"tensors": overfitting, "max_epochs": 40, "learning_rate": 3e-3}
    whole = train("base", options=options, **settings)
    shutil.rmtree(whole.output / "final")
    newest, _ = newest_checkpoint(whole.output)
    capsys.readouterr()
    done = train("base", options=options, resume_from=str(newest), output_dir=str(whole.output), **settings)
    out = capsys.readouterr().out
    assert not done.timesteps or "Validation after" not in out
    assert "so the training stops here" in out and any("final is the best adapter" in text for text in done.messages)
    assert same(whole.output / "final", whole.output / "checkpoints" / "best")


@pytest.mark.slow
def test_a_stop_during_the_validation_that_ends_a_training_is_no_interruption(
    train, overfitting, trainer, load, monkeypatch
):
    from sidestep_plugin import attach
    from sidestep_plugin.validation.history import History

    state, over = {"should_stop": False}, History.over.fget
    monkeypatch.setattr(
        History, "over", property(lambda self: over(self) and (state.__setitem__("should_stop", True) or True))
    )
    from conftest import SETTINGS, known_fields

    output = overfitting.parent / "stopped"
    config = SETTINGS | {"output_dir": str(output), "max_epochs": 40, "learning_rate": 3e-3}
    options = {"validate": 4, "validate_every": 1, "patience": 2}
    with attach(trainer, options=options, announce=lambda _: None):
        made = trainer.LoRATrainer(
            load("base"), trainer.LoRAConfig(r=4, alpha=8), known_fields(trainer.TrainingConfig, config)
        )
        texts = [text for _, _, text in made.train_from_preprocessed(str(overfitting), state)]
    assert any(text.startswith("✅ Training complete: final is the best adapter") for text in texts)
    assert not any("Saved as it was" in text for text in texts) and not (output / "interrupted").exists()
    assert state["should_stop"] is False, "in the app it says that somebody has pressed stop"


# -- what is validated -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_held_out_song_that_changes_is_not_validated_on(train, checkout, folder_of, measured, capsys):
    """And when it is put back, the validation goes on with the same numbers."""
    songs = songs_in(checkout.tensors)
    plain = train("base", tensors=folder_of(songs), options=HELD_OUT, max_epochs=3)
    expected = dict(measured)
    measured.clear()
    folder = folder_of(songs)
    song = folder / choose(songs, 2)[0].name
    kept = folder / "kept"

    def replace(epoch):
        if epoch == 1:
            song.rename(kept)
            tensors = torch.load(kept, weights_only=True)
            torch.save(tensors | {"target_latents": tensors["target_latents"] * 9.0}, song)
        elif epoch == 3:
            kept.replace(song)

    capsys.readouterr()
    done = train("base", tensors=folder, options=HELD_OUT, extra_plugins={"x": AfterEpoch(replace)}, max_epochs=3)
    out = capsys.readouterr().out
    for epoch in (1, 2):
        assert f"Warning: no validation after epoch {epoch}: {song.name}, which is validated on, has changed" in out
    assert sorted(measured) == [0, 3] and torch.equal(measured[3], expected[3])
    assert all(torch.equal(plain.tensors[key], done.tensors[key]) for key in plain.tensors), "the training goes on"


def test_a_held_out_song_that_is_gone_costs_no_training(train, checkout, folder_of, measured, capsys):
    songs = songs_in(checkout.tensors)
    folder = folder_of(songs)
    song = folder / choose(songs, 2)[0].name
    done = train("base", tensors=folder, options=HELD_OUT, extra_plugins={"x": AfterEpoch(lambda _: song.unlink(True))})
    assert f"{song.name}, which is validated on, cannot be read" in capsys.readouterr().out
    assert sorted(measured) == [0] and done.tensors


@pytest.mark.slow
def test_a_checkpoint_has_no_number_of_another_epoch(train):
    """Also where another batch size gives two epochs the same number of steps."""
    first = train("base", options={"validate": 2, "validate_every": 1}, batch_size=1, max_epochs=2)
    done = train(
        "base",
        options={"validate": 2, "validate_every": 5},
        batch_size=2,
        max_epochs=5,
        resume_from=str(checkpoint(first.output, 2)),
    )
    assert facts_in(checkpoint(done.output, 4))["training_steps"] == 8 == 2 * 4, "as many as epoch 2 had"
    for epoch in (3, 4):
        facts = facts_in(checkpoint(done.output, epoch))
        assert facts["epoch"] == epoch and "validation_epoch" not in facts and "validation_loss" not in facts
    assert facts_in(checkpoint(done.output, 5))["validation_epoch"] == 5


def test_songs_that_were_trained_on_are_not_held_out_later(train, checkout, folder_of, tmp_path):
    from sidestep_plugin.miniature import CONDITION_WIDTH, write_tensors

    other = folder_of([])
    write_tensors(other, condition_width=CONDITION_WIDTH, songs=2, seed=999)
    for file in [*other.glob("*.pt")]:
        file.rename(file.with_name(f"other_{file.name}"))
    (other / "manifest.json").unlink()
    first = train("base", options={"validation_dir": other}, max_epochs=1)
    resumed = train("base", options={"validate": 1}, max_epochs=2, resume_from=str(checkpoint(first.output, 1)))
    assert "was trained on all songs of the folder" in resumed.messages[-1] and "cannot be held out" in str(resumed)
    assert not resumed.losses and not resumed.tensors


@pytest.mark.slow
def test_other_contents_of_the_held_out_songs_are_named_on_resume(train, checkout, folder_of, capsys):
    songs = songs_in(checkout.tensors)
    folder = folder_of(songs)
    first = train("base", tensors=folder, options=HELD_OUT, max_epochs=1)
    song = folder / choose(songs, 2)[0].name
    tensors = torch.load(song, weights_only=True)
    torch.save(tensors | {"target_latents": tensors["target_latents"] * 2.0}, song)
    train("base", tensors=folder, options=HELD_OUT, max_epochs=2, resume_from=str(checkpoint(first.output, 1)))
    told = f"the validations before the checkpoint are left out: they were made with other contents of {song.name}"
    assert told in capsys.readouterr().out


@pytest.mark.slow
def test_which_songs_are_held_out_is_decided_once(train, run, checkout, monkeypatch):
    from sidestep_plugin.validation import plugin

    calls = []
    monkeypatch.setattr(plugin, "choose", lambda *given: calls.append(1) or choose(*given))
    train("base", options=HELD_OUT, max_epochs=1)
    assert len(calls) == 1, "in the app"
    calls.clear()
    assert run("--epochs=1").exit_code == 0
    assert len(calls) == 1, "on the command line"


# -- what a resumed training leaves ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_training_that_was_stopped_after_its_last_checkpoint_gets_its_report(train, capsys):
    """Nothing is left to compute then: the report is about what the runs before have computed."""
    whole = train("base", options=HELD_OUT, max_epochs=3)
    capsys.readouterr()
    rest = train("base", options=HELD_OUT, max_epochs=3, resume_from=str(checkpoint(whole.output, 3)))
    assert not rest.timesteps and rest.messages[-1].startswith("✅ Training complete")
    assert any(line.startswith("Loss: mean of epoch 1") for line in rest.messages)
    assert any(line.startswith("Validation: best epoch 3") for line in rest.messages)
    reports = [
        json.loads((place.output / "training_report.json").read_text(encoding="utf-8")) for place in (whole, rest)
    ]
    of_the_run = {"steps_of_this_run": 0, "seconds_per_step": None}
    assert reports[1] == reports[0] | of_the_run and reports[0]["rows"] > 0
    assert reports[0]["validation"]["best_in"] == "checkpoints/best"
    assert same(rest.output / "checkpoints" / "best", whole.output / "checkpoints" / "best")
    on_pages = [read_page(place.output / "index.html") for place in (whole, rest)]
    assert [(data["state"], data["epochs_done"]) for data in on_pages] == [("finished", 3)] * 2
    on_no_page = {"trained_songs": reports[1]["trained_songs"]}
    assert on_pages[1]["report"] | on_no_page == reports[1]
    assert all(torch.equal(whole.tensors[key], rest.tensors[key]) for key in whole.tensors)


def test_what_a_killed_program_left_of_a_page_is_removed(train, tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    left = [".index.html.ab12cd_4.tmp", ".training_report.json.x1y2z3a4.tmp"]
    kept = [".notes.tmp", "index.html.ab12cd_4.tmp"]
    for name in [*left, *kept]:
        (output / name).write_text("half", encoding="utf-8")
    train("base", max_epochs=1, output_dir=str(output))
    assert {file.name for file in output.iterdir() if file.suffix == ".tmp"} == set(kept)
