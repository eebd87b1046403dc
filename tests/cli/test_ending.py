"""The last lines of a training: where the adapter is, the best epoch, the page, and commands that work."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from sidestep_plugin.cli import cli
from sidestep_plugin.cli.next_commands import next_commands
from sidestep_plugin.launch.launch import Request
from sidestep_plugin.report.ending import best_line
from sidestep_plugin.report.page import read_page

QUICK = ["--epochs=2", "--batch-size=2", "--save-every=1", "--rank=4", "--alpha=8", "--gradient-accumulation=1"]


def invoke(*words):
    return CliRunner().invoke(cli, [*map(str, words)], catch_exceptions=False)


@pytest.fixture
def trained(checkout, trainer, tmp_path, monkeypatch):
    """A training by the command line with these options more; returns its result."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sidestep_plugin.cli.quiet.quiet_upstream", lambda: None)

    def train(*more):
        places = ["--acestep-root", checkout.root, "--checkpoint-dir", checkout.checkpoints]
        songs = ["--dataset-dir", checkout.tensors, "--output-dir", "my output"]
        return invoke("--plugin=sidestep", "--model=base", "--device=cpu", *places, *songs, *QUICK, *more)

    return train


def commands_in(output):
    """The commands below "Next:", split as a shell does."""
    block = output.split("\nNext:\n")[1]
    return [shlex.split(line.strip()) for line in re.findall(r"^ {4}(acestep-train .*)$", block, re.MULTILINE)]


@pytest.mark.slow
def test_every_command_at_the_end_works(trained, tmp_path):
    done = trained("--validate", 1, "--validate-every", 1, "--trigger", "ltnjz")
    assert done.exit_code == 0, done.output
    output = tmp_path / "my output"
    order = ["Total time: ", f"Adapter: {output / 'final'}", "Best epoch: ", "Generate with ", "Page: ", "Next:"]
    places = [done.output.rindex(f"\n{word}") for word in order]
    assert places == sorted(places)
    assert f"Page: {output / 'index.html'}\n" in done.output and f"in {output / 'checkpoints' / 'best'}" in done.output
    commands = commands_in(done.output)
    assert [words[1] for words in commands] == ["compare", "list", "export"]  # these models have no VAE
    for words in commands:
        result = invoke(*words[1:])
        assert result.exit_code == 0, (words, result.output)
    assert [shlex.split(command) for _, command in read_page(output / "index.html")["commands"]] == commands


def request(tmp_path, **options):
    return Request("base", tmp_path / "songs", tmp_path, options=options, plugins=("sidestep",))


def saved(folder, **facts):
    folder.mkdir(parents=True)
    (folder / "training_config.json").write_text(json.dumps(facts), encoding="utf-8")
    return facts


def reported(output, **validation):
    (output / "training_report.json").write_text(json.dumps({"validation": validation}), encoding="utf-8")


def test_the_best_epoch_is_compared_where_it_is_another_one(tmp_path, monkeypatch):
    monkeypatch.setattr("sidestep_plugin.cli.next_commands._can_be_heard", lambda _: True)
    saved(tmp_path / "final" / "adapter", epoch=9)
    assert [command.split()[1] for _, command in next_commands(request(tmp_path, validate=2.0), "finished")] == [
        *("preview", "list", "export")
    ]
    saved(tmp_path / "checkpoints" / "best", epoch=3)
    reported(tmp_path, best_epoch=3, best_in="checkpoints/best")
    (_, (_, compare), _) = next_commands(request(tmp_path, validate=2.0), "finished")
    assert "checkpoints/best" in Path(shlex.split(compare)[3]).as_posix() and compare.endswith("--validate 2")
    (_, (_, compare), _) = next_commands(request(tmp_path, validation_dir=tmp_path / "other songs"), "finished")
    assert shlex.split(compare)[-1] == str(tmp_path / "other songs")
    (_, (_, other), _) = next_commands(request(tmp_path), "finished")  # best by ACE-Step's own --val-split
    assert other.split()[1] == "list"
    reported(tmp_path, best_epoch=7, best_in=None)  # there was no room for it, and epoch 3 is the best before
    (_, (_, other), _) = next_commands(request(tmp_path, validate=2.0), "finished")
    assert other.split()[1] == "list"


@pytest.mark.slow
def test_clips_of_the_last_command_can_be_heard_where_there_is_a_vae(trained, checkout, tmp_path):
    from sidestep_plugin import miniature

    if checkout.real:
        pytest.skip("the miniature's VAE decodes its own latents")
    models = shutil.copytree(checkout.checkpoints, tmp_path / "models")
    miniature.write_encoders(models)
    done = trained("--checkpoint-dir", models, "--epochs", 1)
    (listen, *_) = commands_in(done.output)
    assert listen[1] == "preview" and invoke(*listen[1:], "--seconds", "0.2").exit_code == 0
    assert list((tmp_path / "my output").rglob("*.wav"))


def test_nobody_is_told_to_listen_where_nothing_can_be_heard(tmp_path):
    saved(tmp_path / "final" / "adapter", epoch=9)
    (tmp_path / "root" / "acestep" / "training").mkdir(parents=True)
    (tmp_path / "root" / "acestep" / "training" / "trainer.py").touch()
    here = replace(request(tmp_path), acestep_root=tmp_path / "root", checkpoint_dir=tmp_path / "models")
    told = next_commands(here, "finished")
    assert [command.split()[1] for _, command in told] == ["compare", "list", "export"]
    assert told[0][0] == "Compare it with the model without it, by its loss:"
    (tmp_path / "models" / "vae").mkdir(parents=True)
    (tmp_path / "models" / "vae" / "config.json").write_text('{"auto_map": {}}', encoding="utf-8")
    assert next_commands(here, "finished")[0][0].startswith("Listen to it")


def test_a_training_that_has_saved_nothing_is_not_resumed(tmp_path):
    assert next_commands(request(tmp_path), "failed") == []
    (tmp_path / "interrupted").mkdir()
    for state in ("stopped", "failed"):
        assert next_commands(request(tmp_path), state)[0][1].endswith("--resume-from latest --adapter-type lora")


def test_the_best_epoch_is_told_beside_the_finished_adapter(tmp_path):
    assert best_line(tmp_path, {}) is None
    epochs = [{"epoch": epoch, "change": change} for epoch, change in ((0, 0.0), (3, -0.021), (9, 0.004))]
    report = {"validation": {"best_epoch": 3, "epochs": epochs}}
    (tmp_path / "training_report.json").write_text(json.dumps(report), encoding="utf-8")
    told = "Best epoch: 3, validation loss -2.10 % vs. no adapter"
    assert best_line(tmp_path, {"validation_epoch": 9, "validation_change": 0.004}) == f"{told}; final: +0.40 %"
    assert best_line(tmp_path, {"validation_epoch": 3, "validation_change": -0.021}) == f"{told}; final is the same"
    assert best_line(tmp_path, {}) == f"{told}; final was not validated"
    (tmp_path / "checkpoints" / "best").mkdir(parents=True)
    assert best_line(tmp_path, {}) == f"{told}; final was not validated", "a folder of that name says nothing"
    report["validation"]["best_in"] = "checkpoints/best"
    (tmp_path / "training_report.json").write_text(json.dumps(report), encoding="utf-8")
    assert f", in {tmp_path / 'checkpoints' / 'best'}; final" in str(best_line(tmp_path, {}))
    report["validation"]["best_epoch"] = None
    (tmp_path / "training_report.json").write_text(json.dumps(report), encoding="utf-8")
    assert best_line(tmp_path, {}) is None
