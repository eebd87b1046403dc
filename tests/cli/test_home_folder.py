"""``~`` is the home folder in every path, whoever reads it: no shell replaces it in ``--output-dir=~/lora``."""

from __future__ import annotations

import os
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from sidestep_plugin.cli import COMMANDS, cli
from sidestep_plugin.errors import Refusal
from sidestep_plugin.files import at_home
from sidestep_plugin.gpu_report import __main__ as gpu_report
from sidestep_plugin.options import Place
from sidestep_plugin.registry import Registry


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder, which is not the current one."""
    folder = tmp_path / "home"
    folder.mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    return folder


def all_commands(group, ctx):
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        yield command
        if isinstance(command, click.Group):
            yield from all_commands(command, ctx)


def test_every_option_and_argument_that_names_a_place_knows_it():
    ctx = click.Context(cli)
    parameters = [parameter for command in all_commands(cli, ctx) for parameter in command.params]
    parameters += Registry.load(("sidestep",)).declared_options()
    parameters += gpu_report.main.params
    assert len(parameters) > 100 and set(COMMANDS) == set(cli.list_commands(ctx))
    places = [parameter for parameter in parameters if isinstance(parameter.type, click.Path)]
    assert len(places) > 20
    assert not [parameter.name for parameter in places if not isinstance(parameter.type, Place)]
    # A path in an option of another type would not be seen above.
    paths = [p for p in parameters if str(p.metavar).startswith(("DIR", "FILE")) or str(p.name).endswith("_dir")]
    assert not [parameter.name for parameter in paths if not isinstance(parameter.type, Place)]


def test_all_folders_of_a_training(checkout, trainer, home, monkeypatch):
    monkeypatch.setattr("sidestep_plugin.cli.quiet.quiet_upstream", lambda: None)
    for name, folder in (("root", checkout.root), ("models", checkout.checkpoints), ("songs", checkout.tensors)):
        (home / name).symlink_to(folder)
    monkeypatch.setenv("ACESTEP_CHECKPOINTS_DIR", "~/models")
    settings = 'output-dir = "~/lora"\ndataset-dir = "~/songs"\nplugin = "sidestep"\nepochs = 1\ndevice = "cpu"\n'
    (home / "settings.toml").write_text(settings, encoding="utf-8")
    for model, output in (("base", ()), ("~/models/acestep-v15-base", ("--output-dir=~/other",))):
        line = ["train", "--config=~/settings.toml", f"--acestep-root={checkout.root}", "--model", model, *output]
        done = CliRunner().invoke(cli, line, catch_exceptions=False)
        assert done.exit_code == 0, done.output
    assert (home / "lora" / "final").is_dir() and (home / "other" / "final").is_dir()
    assert not list(Path.cwd().iterdir()), "nothing is called ~"
    for line in (["inspect", "~/lora"], ["list", "~/lora"]):
        done = CliRunner().invoke(cli, line, catch_exceptions=False)
        assert done.exit_code == 0, done.output


@pytest.mark.parametrize("name", ["~", "~/a/b", f"~{os.sep}a"])
def test_the_home_folder(home, name):
    assert at_home(name).startswith(str(home))


@pytest.mark.parametrize("name", ["a~b", "./~", "folder/~/x", ""])
def test_only_at_the_beginning(home, name):
    assert at_home(name) == name


def test_a_user_who_is_not_there(home, checkout, monkeypatch):
    with pytest.raises(Refusal, match="no home folder for ~nobody-at-all"):
        at_home("~nobody-at-all/x")
    done = CliRunner().invoke(cli, ["inspect", "~nobody-at-all/x"])
    assert done.exit_code == 2 and "~nobody-at-all" in done.stderr and "Traceback" not in done.stderr
    monkeypatch.setenv("ACESTEP_CHECKPOINTS_DIR", "~nobody-at-all/x")
    done = CliRunner().invoke(cli, ["timesteps", "--model", "base", f"--acestep-root={checkout.root}"])
    assert done.exit_code == 2 and "$ACESTEP_CHECKPOINTS_DIR, which is ~nobody-at-all/x" in done.stderr


def test_an_option_from_python_and_from_the_environment(home):
    registry = Registry.load(("sidestep",))
    assert registry.resolve_options({"validation_dir": "~/songs"})["validation_dir"] == home / "songs"
    values, _ = registry.options_in({"SIDESTEP_VALIDATION_DIR": "~/songs"})
    assert registry.resolve_options(values)["validation_dir"] == home / "songs"


def test_an_empty_folder_is_not_the_current_one(home):
    with pytest.raises(Refusal, match="name is empty"):
        Registry.load(("sidestep",)).resolve_options({"validation_dir": ""})
    with pytest.raises(Refusal, match="5 is not the name of a file or folder"):
        Registry.load(("sidestep",)).resolve_options({"validation_dir": 5})
