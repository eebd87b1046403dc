"""What a command does when nothing is said: the plugin that takes part, and the settings of a training."""

from __future__ import annotations

import json
import math
import re
import textwrap

import pytest
from click.testing import CliRunner

from sidestep_plugin.cli import cli
from sidestep_plugin.cli.command_line import words_of
from sidestep_plugin.cli.commands import as_said, chosen
from sidestep_plugin.cli.resumed import plugins_of
from sidestep_plugin.launch.launch import Request
from sidestep_plugin.recommended import SETTINGS, recommended


@pytest.fixture(scope="module")
def train(checkout, trainer, tmp_path_factory):
    """``acestep-train`` in this process, into one folder: ``train("--epochs", 1)`` returns what click has seen."""
    output = tmp_path_factory.mktemp("defaults") / "output"
    places = [f"--acestep-root={checkout.root}", f"--checkpoint-dir={checkout.checkpoints}"]

    def invoke(*words, output=output, **more):
        line = [*places, f"--output-dir={output}", f"--dataset-dir={checkout.tensors}", "--model=base", "--device=cpu"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sidestep_plugin.cli.quiet.quiet_upstream", lambda: None)
            return CliRunner().invoke(cli, [*line, *map(str, words)], catch_exceptions=False)

    invoke.output = output
    return invoke


@pytest.fixture(scope="module")
def trained(train):
    """What is printed by a training of one epoch with a few settings of its own."""
    done = train("--epochs", 1, "--batch-size", 2, "--rank", 4, "--weight-decay", "0.02")
    assert done.exit_code == 0, done.output
    return done.output


def facts_of(folder):
    return json.loads((folder / "final" / "adapter" / "training_config.json").read_text(encoding="utf-8"))


# -- plugins ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "plugins"),
    [
        ([], ["sidestep"]),
        (["sidestep"], ["sidestep"]),
        (["noise"], ["sidestep", "noise"]),
        (["noise", "sidestep"], ["noise", "sidestep"]),
        (["noise", "noise"], ["sidestep", "noise"]),
        (["none"], []),
        (["none", "noise"], ["noise"]),
        (["noise", "none"], ["noise"]),
    ],
)
def test_sidestep_takes_part_unless_none_is_said(said, plugins):
    assert list(chosen(said)) == plugins
    # and what stands in a command line or a file means the same again
    assert list(chosen(as_said(plugins))) == list(chosen(as_said(plugins, whole=False))) == plugins


def test_where_no_plugin_takes_part_by_itself_only_the_named_ones_do():
    assert chosen([], ()) == () == chosen(["none"], ())
    assert chosen(["noise"], ()) == ("noise",)


def test_a_training_without_a_word_about_plugins_has_sidestep(train, trained):
    assert "Timesteps: continuous" in trained and "Warning: without a plugin" not in trained
    assert facts_of(train.output)["cfg_ratio"] == 0.15


@pytest.mark.parametrize("command", ["estimate", "compare", "preview", "prepare", "timesteps", "demo", "train"])
def test_every_command_of_a_training_takes_the_option_and_refuses_a_plugin_that_is_not_there(command, tmp_path):
    needed = {
        "estimate": ["--model=base", "--seconds=9"],
        "compare": ["x", "--model=base", f"--dataset-dir={tmp_path}"],
        "preview": ["x"],
        "prepare": [str(tmp_path), "--model=base", f"--output={tmp_path / 'songs'}"],
        "timesteps": ["--model=base"],
    }
    done = CliRunner().invoke(cli, [command, *needed.get(command, []), "--plugin=sidestap"])
    assert done.exit_code == 2 and "No plugin 'sidestap' is installed. Did you mean sidestep?" in done.stderr


@pytest.mark.parametrize("command", ["compare", "preview"])
def test_a_plugin_that_changes_nothing_is_said_to_change_nothing(command, tmp_path):
    more = ["--model=base", f"--dataset-dir={tmp_path}"] if command == "compare" else []
    for plugin, noted in (("none", True), ("sidestep", False)):
        done = CliRunner().invoke(cli, [command, str(tmp_path / "x"), *more, f"--plugin={plugin}"])
        assert done.exit_code == 2 and ("Note: --plugin changes nothing here: " in done.stderr) is noted


def test_an_estimate_without_the_plugin_is_ace_steps_alone():
    both, alone = (
        CliRunner().invoke(cli, ["estimate", "--model=base", "--seconds=60", "--memory=6GB", "--json", *more]).stdout
        for more in ([], ["--plugin=none"])
    )
    both, alone = json.loads(both), json.loads(alone)
    assert alone["rows"][0]["name"] == both["rows"][0]["name"] and len(alone["rows"]) == 1 < len(both["rows"])
    assert alone["flags"] is None and both["flags"]


def test_songs_are_prepared_as_ace_step_does_without_the_plugin():
    from sidestep_plugin.cli.prepare import _conditions

    assert (_conditions(()), _conditions(("sidestep",)), _conditions(("none",))) == (
        "generated",
        "generated",
        "upstream",
    )


# -- a training that is resumed --------------------------------------------------------------------------------------


def test_a_training_is_resumed_with_the_plugins_and_the_settings_of_its_checkpoint(train, trained):
    done = train("--resume-from", "latest", "--epochs", 2)
    assert done.exit_code == 0, done.output
    assert "Plugins: sidestep, as in the checkpoint\n" in done.output
    facts = facts_of(train.output)
    assert (facts["rank"], facts["alpha"], facts["batch_size"], facts["weight_decay"]) == (4, 8, 2, 0.02)
    assert "Note: changed since the checkpoint: epochs (was 1, now 2)" in done.output
    assert done.output.count("changed since the checkpoint") == 1


def test_the_plugins_of_a_checkpoint_stand_in_the_file_beside_it(tmp_path):
    (tmp_path / "adapter").mkdir()
    file = tmp_path / "adapter" / "training_options.toml"
    for text, plugins in (
        ('plugin = ["sidestep", "noise"]', ("sidestep", "noise")),
        ('plugin = ["none", "noise"]', ("noise",)),
    ):
        file.write_text(text, encoding="utf-8")
        assert plugins_of(tmp_path) == plugins
    file.unlink()
    assert plugins_of(tmp_path) is None
    (tmp_path / "resume_state.pt").touch()  # as of a training in the app, which writes no such file
    assert plugins_of(tmp_path) == ("sidestep",)


@pytest.mark.parametrize("resumed", ["latest", "folder"])
def test_a_checkpoint_of_ace_step_alone_is_asked_about(train, tmp_path, resumed):
    folder = tmp_path / "checkpoints" / "epoch_1_loss_1.0"
    folder.mkdir(parents=True)
    (folder / "training_state.pt").touch()
    said = ("--resume-from", "latest" if resumed == "latest" else folder)
    done = train(*said, output=tmp_path)
    assert done.exit_code == 2 and done.stderr.count("\n") == 1
    assert "was saved by ACE-Step without a plugin. Say how to go on: --plugin sidestep" in done.stderr
    said_so = train(*said, "--plugin", "sidestep", output=tmp_path)
    assert "Say how to go on" not in said_so.stderr


@pytest.fixture
def mood(monkeypatch, tmp_path):
    """A plugin of somebody else's with an option and a folder of this machine."""
    from importlib.metadata import EntryPoint

    from sidestep_plugin import registry

    code = """
        import click
        from sidestep_plugin import hookimpl
        @hookimpl
        def acestep_options():
            return [click.Option(["--mood"], type=int, default=1), click.Option(["--calm"], is_flag=True)]
        @hookimpl
        def acestep_run_started(run):
            return [f"Mood: {run.options['mood']}, {run.options['calm']}"]
    """
    (tmp_path / "mood_plugin.py").write_text(textwrap.dedent(code), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    found = [*registry.installed_plugins()]
    point = EntryPoint("mood", "mood_plugin", "acestep.plugins")
    monkeypatch.setattr(registry, "installed_plugins", lambda: [*found, registry.Installed("mood", "mood", "1", point)])


@pytest.mark.slow
def test_plugins_options_are_those_of_the_checkpoint(train, mood, tmp_path):
    """Of the plugin sidestep and of everybody's; what is typed wins, and it is said."""
    options = ["--mood", 3, "--calm", "--crop-seconds", 0.4, "--time-limit", "1h", "--title", "Two words"]
    first = train("--plugin", "mood", "--epochs", 1, "--rank", 4, *options, output=tmp_path / "out")
    assert first.exit_code == 0 and "Mood: 3, True" in first.output, first.output
    resumed = train("--resume-from", "latest", "--epochs", 2, output=tmp_path / "out")
    assert resumed.exit_code == 0, resumed.output
    assert "Plugins: sidestep, mood, as in the checkpoint\n" in resumed.output
    (said,) = re.findall("^Options: .*$", resumed.output, flags=re.MULTILINE)
    assert said == "Options: --crop-seconds 0.4 --title 'Two words' --mood 3 --calm, as in the checkpoint"
    assert "Mood: 3, True" in resumed.output and "changed since the checkpoint: crops" not in resumed.output
    assert facts_of(tmp_path / "out")["crop_seconds"] == 0.4
    checkpoint = max((tmp_path / "out/checkpoints").glob("epoch_2*"))
    other = train(
        "--resume-from", checkpoint, "--epochs", 3, "--mood", 4, "--crop-seconds", 0.3, output=tmp_path / "out"
    )
    assert other.exit_code == 0 and "Mood: 4, True" in other.output, other.output
    assert "Note: changed since the checkpoint: --mood (was --mood 3, now --mood 4)\n" in other.output
    assert "Note: changed since the checkpoint: crops in seconds (was 0.4, now 0.3)\n" in other.output


# -- settings --------------------------------------------------------------------------------------------------------


def test_what_is_left_out_is_what_is_recommended_and_is_said_before_the_first_step(train, trained):
    (line,) = re.findall(r"^Settings: (.*)$", trained, flags=re.MULTILINE)
    assert line.startswith("alpha 8, learning rate 0.0001, gradient accumulation 3, warmup steps 0, save every 1 (")
    assert line.endswith("(recommended for 6 songs; acestep-train recommended --songs 6 says why)")
    assert trained.index("Settings: ") < trained.index("step ")
    # in the end they are in the file that repeats the training
    text = (train.output / "final" / "adapter" / "training_options.toml").read_text(encoding="utf-8")
    assert "gradient-accumulation = 3\n" in text and "alpha = 8\n" in text


def test_ace_steps_own_settings_are_there_for_those_who_ask(train, tmp_path):
    done = train("--settings", "upstream", "--epochs", 1, output=tmp_path / "output")
    assert done.exit_code == 0, done.output
    (line,) = re.findall(r"^Settings: (.*)$", done.output, flags=re.MULTILINE)
    assert line.startswith("rank 8, alpha 16, learning rate 0.0001, batch size 1, gradient accumulation 4, warmup")
    assert line.endswith("(ACE-Step's own)") and facts_of(tmp_path / "output")["rank"] == 8


def test_a_file_is_not_taken_for_settings(train, tmp_path):
    done = train("--settings", "jazz.toml", output=tmp_path / "output")
    assert done.exit_code == 2 and "'jazz.toml' is not one of 'recommended', 'upstream'" in done.stderr


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize(
    "given",
    [{}, {"epochs": 3}, {"batch_size": 4}, {"rank": 16}, {"gradient_accumulation": 2}, {"epochs": 7, "batch_size": 3}],
)
def test_the_rest_goes_with_what_was_given(given, processes):
    for songs in (1, 2, 6, 13, 100, 1300):
        usual = {name: entry.value for name, entry in recommended(songs, "lora", given, processes).items()}
        assert set(usual) == set(SETTINGS) - set(given)
        all_of_them = usual | given
        batches = math.ceil(math.ceil(songs / processes) / all_of_them["batch_size"])
        assert "gradient_accumulation" in given or batches % usual["gradient_accumulation"] == 0
        steps = all_of_them["epochs"] * batches / all_of_them["gradient_accumulation"]
        assert usual["warmup_steps"] <= steps / 10
        assert usual["alpha"] == 2 * all_of_them["rank"]
        assert 1 <= usual["save_every"] <= all_of_them["epochs"]


def test_a_command_that_is_printed_says_what_is_not_usual(tmp_path):
    request = Request("base", tmp_path, tmp_path, plugins=("sidestep",), defaults="recommended")
    assert "--plugin" not in words_of(request) and "--settings" not in words_of(request)
    from dataclasses import replace

    assert words_of(replace(request, defaults="upstream"))[-2:] == ["--settings", "upstream"]
    assert words_of(replace(request, plugins=(), defaults="upstream"))[:2] == ["--plugin", "none"]
    assert "--settings" not in words_of(replace(request, plugins=(), defaults="upstream"))
