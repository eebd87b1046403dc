"""Settings files: what is written is read back, what cannot be used is refused, and a training can be repeated."""

from __future__ import annotations

import os
import tomllib

import click
import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from sidestep_plugin.cli import cli
from sidestep_plugin.cli.settings_file import FILE_NAME, SettingsFile, write
from sidestep_plugin.errors import Refusal

FILE = """
plugin = ["sidestep"]
model = "base"
epochs = 2
batch-size = 2
rank = 4
alpha = 8
save_every = 1
learning-rate = 0.01
gradient-accumulation = 1
target-modules = ["q_proj", "v_proj"]
title = "Jazz, \\"live\\""
"""


@pytest.fixture
def run(checkout, trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sidestep_plugin.cli.quiet.quiet_upstream", lambda: None)

    def invoke(text, *more, output="output"):
        (tmp_path / "jazz.toml").write_text(text, encoding="utf-8")
        line = ["--config", "jazz.toml", "--acestep-root", checkout.root, "--checkpoint-dir", checkout.checkpoints]
        line += ["--dataset-dir", checkout.tensors, "--output-dir", tmp_path / output, "--device", "cpu", *more]
        return CliRunner().invoke(cli, [*map(str, line)], catch_exceptions=False)

    return invoke


def options_beside(folder):
    return tomllib.loads((folder / FILE_NAME).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "value",
    [
        True,
        False,
        0,
        -3,
        2**63 - 1,
        0.1,
        1e-5,
        1e300,
        "",
        "plain",
        'quotes " and \\ and \\u0041',
        "several\nlines\tand\x00\x1f\x7f control",
        "Ünïcödé 音楽 🎵",
        "# no comment",
        ["q_proj", 'odd "name"'],
        [1, 2],
    ],
)
def test_what_is_written_is_read_back(value):
    text = write({"some_name": value, "other": 1, "left_out": None}, ["A comment\nof two lines"])
    assert tomllib.loads(text) == {"some-name": value, "other": 1}


def test_options_come_from_the_file_and_the_command_line_wins(run, tmp_path):
    done = run(FILE, "--epochs", "1", "--author", "Ann")
    assert done.exit_code == 0, done.output
    final = tmp_path / "output" / "final" / "adapter"
    written = options_beside(final)
    assert (written["epochs"], written["batch-size"], written["rank"], written["model"]) == (1, 2, 4, "base")
    assert (written["title"], written["author"], written["plugin"]) == ('Jazz, "live"', "Ann", ["sidestep"])
    assert written["target-modules"] == ["q_proj", "v_proj"]
    # Defaults that nobody typed are in it, too: they may be others tomorrow.
    assert (written["seed"], written["weight-decay"], written["cfg-ratio"]) == (42, 0.01, 0.15)


def test_beside_every_adapter_and_without_a_folder_of_this_machine(run, checkout, tmp_path):
    done = run(FILE, "--model", str(checkout.checkpoints / "acestep-v15-sft"))
    assert done.exit_code == 0, done.output
    adapters = sorted(file.parent for file in (tmp_path / "output").rglob("*.safetensors"))
    assert len(adapters) == 3
    for folder in adapters:
        text = (folder / FILE_NAME).read_text(encoding="utf-8")
        assert "model" not in options_beside(folder) and "acestep-v15-sft" in text
        for place in (tmp_path, checkout.root, checkout.tensors, checkout.checkpoints):
            assert str(place) not in text


def test_the_file_beside_an_adapter_repeats_its_training(run, tmp_path):
    assert run(FILE).exit_code == 0
    first = tmp_path / "output" / "final" / "adapter"
    done = run((first / FILE_NAME).read_text(encoding="utf-8"), output="again")
    assert done.exit_code == 0, done.output
    again = tmp_path / "again" / "final" / "adapter"
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (first, again))
    assert one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)
    assert (first / FILE_NAME).read_bytes() == (again / FILE_NAME).read_bytes()


def test_it_never_takes_the_last_room_on_a_disk(run, tmp_path, monkeypatch):
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20 - 1))
    done = run(FILE)
    assert done.exit_code == 0, done.output
    assert f"Warning: no {FILE_NAME} was written" in done.output and not list((tmp_path / "output").rglob(FILE_NAME))


def test_without_a_plugin_no_file_is_added(run, tmp_path):
    done = run(FILE.replace('plugin = ["sidestep"]', 'plugin = "none"').replace("title", "# title"))
    assert done.exit_code == 0, done.output
    assert not list((tmp_path / "output").rglob(FILE_NAME))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("epocs = 2", "there is no option epocs. Did you mean epochs?"),
        ("zzz = 2", "there is no option zzz. Expected names as in --help."),
        ("config = 'other.toml'", "there is no option config."),
        ("epochs = 0", "epochs = 0 cannot be used. Correct it: 0 is not in the range"),
        ("epochs = 8.7", "epochs = 8.7 cannot be used. Correct it: 8.7 is not a whole number."),
        ("epochs = true", "epochs = True cannot be used. Expected a text or a number."),
        ("epochs = [1]", "epochs = [1] cannot be used. Expected a text or a number."),
        ("lokr-factor = inf", "lokr-factor = inf cannot be used. Correct it: inf is not a whole number."),
        ("lokr-factor = 4.7", "lokr-factor = 4.7 cannot be used. Correct it: 4.7 is not a whole number."),
        ("learning-rate = nan", "learning-rate = nan cannot be used."),
        ("adapter-type = 'loha'", "adapter-type = 'loha' cannot be used. Correct it: 'loha' is not one of"),
        ("overwrite = 'yes'", "overwrite = 'yes' cannot be used. Expected true or false."),
        ("target-modules = [['q_proj']]", "cannot be used. Expected a list of texts."),
        ("seed = 2026-01-01", "cannot be used. Expected a text or a number."),
        ("[rank]\nvalue = 3", "rank = {'value': 3} cannot be used."),
        ("plugin = 3", "plugin = 3 names no plugin."),
        ("cfg-ratio = 2", "cfg-ratio = 2 cannot be used."),
        ("batch-size = 1\nbatch_size = 2", "says batch_size twice"),
        ("epochs 2", "jazz.toml is not TOML: "),
    ],
)
def test_what_cannot_be_used_is_refused(run, tmp_path, text, says):
    done = run(text if text.startswith("plugin") else f'plugin = ["sidestep"]\n{text}', "--model", "base")
    assert done.exit_code == 2 and says in done.stderr, done.stderr
    assert "jazz.toml" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "output").exists()


def test_what_a_plugins_own_type_cannot_read_is_refused(tmp_path):
    """click's int makes a traceback of infinity."""
    file = tmp_path / "jazz.toml"
    command = click.Command("train", params=[click.Option(["--bands"], type=int)])
    with pytest.raises(
        Refusal, match="bands = inf cannot be used. Correct it: cannot convert float infinity to integer."
    ):
        SettingsFile(file, {"bands": float("inf")}).checked(command.params, click.Context(command))


def test_a_file_that_is_not_there(tmp_path):
    done = CliRunner().invoke(cli, ["--config", str(tmp_path / "gone.toml")])
    assert done.exit_code == 2 and "gone.toml: No such file" in done.stderr.replace("or directory", "")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.toml")
    done = CliRunner().invoke(cli, ["--config", str(tmp_path / "pipe.toml")])
    assert done.exit_code == 2 and "it is a named pipe, not a file" in done.stderr


@pytest.mark.parametrize("line", ["--seed=4294967296", "--num-workers=1000000", "--batch-size=99999999999999999999"])
def test_numbers_that_nothing_can_use_are_refused_before_anything_is_loaded(line):
    done = CliRunner().invoke(cli, [line])
    assert done.exit_code == 2 and "is not in the range" in done.stderr


def test_the_command_that_repeats_a_training_names_the_folders_that_it_needs(run, checkout, tmp_path):
    """What is validated on is a folder of this machine, and --patience means nothing without it."""
    from sidestep_plugin.miniature import CONDITION_WIDTH, write_tensors

    other = tmp_path / "validated on"
    write_tensors(other, condition_width=CONDITION_WIDTH, songs=2, seed=999)
    for file in [*other.glob("*.pt")]:
        file.rename(file.with_name(f"other_{file.name}"))
    (other / "manifest.json").unlink()
    assert run(FILE, "--validation-dir", other, "--patience", 3).exit_code == 0
    first = tmp_path / "output" / "final" / "adapter"
    text = (first / FILE_NAME).read_text(encoding="utf-8")
    assert "--dataset-dir DIR --output-dir DIR --validation-dir DIR" in text and str(other) not in text
    done = run(text, "--validation-dir", other, output="again")
    assert done.exit_code == 0, done.output
    again = tmp_path / "again" / "final" / "adapter"
    one, other_one = (load_file(folder / "adapter_model.safetensors") for folder in (first, again))
    assert all((one[key] == other_one[key]).all() for key in one) and options_beside(again)["patience"] == 3
