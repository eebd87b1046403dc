"""What ``--help`` shows and costs, and what a command line without any words does."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner
from conftest import COMMAND

from sidestep_plugin.cli import COMMANDS, cli
from sidestep_plugin.cli.commands import without_range
from sidestep_plugin.cli.demo import _SETTINGS

WIDTH = 110


def shown(*words):
    done = CliRunner().invoke(cli, [*words, "--help"], terminal_width=WIDTH, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def modules_of(code):
    """Names of the modules that a program has imported when it ends."""
    ending = "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr))\n"
    line = [sys.executable, "-c", ending + code, "--help"]
    return set(subprocess.run(line, capture_output=True, text=True, check=True).stderr.split())


def test_help_imports_click_and_a_few_small_modules():
    bare = "import click\n@click.group()\ndef main(): 'Nothing.'\nmain()"
    ours = modules_of("from sidestep_plugin.cli import main; main()") - modules_of(bare)
    ours = {name for name in ours if not name.startswith("encodings")}
    assert {name for name in ours if name.startswith("sidestep_plugin")} == {
        "sidestep_plugin",
        "sidestep_plugin.cli",
        "sidestep_plugin.cli.commands",
        "sidestep_plugin.cli.groups",
        "sidestep_plugin.cli.interrupts",
        "sidestep_plugin.cli.terminal",
        "sidestep_plugin.errors",
        "sidestep_plugin.ranks",
        "sidestep_plugin.signals",
    }
    assert not ours & {"torch", "pluggy", "importlib.metadata", "json", "tomllib", "subprocess", "logging"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_where_the_group_looks_for_it(name):
    command = cli.get_command(click.Context(cli), name)
    assert command is not None and command.name == name
    assert COMMANDS[name] in shown() and COMMANDS[name].endswith(".")


def test_a_command_that_does_not_exist():
    done = CliRunner().invoke(cli, ["trian"])
    assert done.exit_code == 2 and "No such command 'trian'. Did you mean train?" in done.stderr


@pytest.mark.parametrize("words", [("train",), ("--plugin", "sidestep"), ("demo",), ("timesteps",), ("schedule",)])
def test_no_range_of_numbers_is_shown(words):
    text = shown(*words)
    assert not re.search(r"x[<>]|[<>]=?x|9223372036854775807|RANGE", text), text


@pytest.mark.parametrize(
    ("record", "kept"),
    [
        ("Rank.  [x>=1]", "Rank."),
        ("Seed.  [default: 42; 0<=x<=9223372036854775807]", "Seed.  [default: 42]"),
        ("Ratio.  [default: 0.15; 0.0<=x<=1.0]", "Ratio.  [default: 0.15]"),
        ("Rate.  [x>0.0]", "Rate."),
        ("Split.  [0.0<=x<1.0]", "Split."),
        ("Model.  [required]", "Model.  [required]"),
        ("Layers.  [ACE-Step's default: q_proj]", "Layers.  [ACE-Step's default: q_proj]"),
        ("No bracket.", "No bracket."),
        ("Factor.  [default: -1]  [-1<=x<=1000000000]", "Factor.  [default: -1]"),
    ],
)
def test_only_the_range_is_left_out(record, kept):
    assert without_range(record) == kept


@pytest.mark.parametrize("words", [("train",), ("demo",), ("timesteps",), ("recommended",), ("check",)])
def test_every_help_text_fits_its_line(words):
    own = shown(*words).partition("  --title")[0]  # from there on they are about the adapter
    options = re.findall(r"^  -.*\n(?: {5,}\S.*\n)*", own, flags=re.MULTILINE)
    assert len(options) > 2
    assert [text for text in options if text.count("\n") > 1] == []


def test_options_are_in_groups_with_those_of_the_plugin_last():
    text = shown("train")
    places = [text.index(f"\n{title}:\n") for title in ("Needed", "Usual", "Expert", "Options of the plugin sidestep")]
    assert places == sorted(places)
    assert re.search(r"Needed:\n  --model .*\n  --dataset-dir .*\n  --output-dir ", text)
    # Every option of its own has a group; only --help has none.
    assert re.findall(r"^  (-\S+)", text.partition("\nOptions:\n")[2], flags=re.MULTILINE)[0] == "-h,"


def test_the_demos_defaults_are_its_own():
    text = shown("demo")
    for name, value in _SETTINGS.items():
        assert re.search(rf"--{name.replace('_', '-')} .*\[default: {value}\]", text), name
    for command in ("train", "demo", "timesteps", "estimate", "compare", "preview", "prepare"):
        assert re.search(r"--plugin NAME\|none .* none: without sidestep", shown(command)), command


def test_what_says_nothing_there_is_not_in_the_help_and_works():
    assert set(re.findall(r"^  (--[a-z-]+)", shown("timesteps").partition("plugin sidestep:")[2], re.MULTILINE)) == {
        "--variant",
        "--timestep-mode",
    }
    for option in ("--devices", "--rendezvous", "--base-weights", "--compile", "--init-from"):
        assert option in shown("train") and option not in shown("demo"), option
    assert "--validate" in shown("demo") and "--preview-every" in shown("demo")
    done = CliRunner().invoke(cli, ["timesteps", "--model=nowhere", "--cfg-ratio=0.1"])
    assert "No such option" not in done.stderr


def test_without_a_word_and_without_a_terminal_it_is_the_help():
    done = CliRunner().invoke(cli, [])
    assert done.exit_code == 2 and "Usage: " in done.stderr and "Commands:" in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_without_a_word_on_a_terminal_it_asks(tmp_path):
    from terminal import CTRL_C, in_a_terminal

    seen = in_a_terminal(COMMAND, [(r"Folder: $", CTRL_C)], cwd=tmp_path)
    assert seen.code != 0 and "Traceback" not in seen.text
    assert "Training with the plugin sidestep." in seen.text and "the folder of your ACE-Step 1.5 checkout" in seen.text


@pytest.mark.skipif(os.name == "nt", reason="click completes for bash, zsh and fish")
@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (["ins"], {"inspect"}),
        (["--mod"], {"--model"}),
        (["--plugin", "sidestep", "--cfg"], {"--cfg-ratio"}),
        (["train", "--warm"], {"--warmup-steps"}),
        (["--adapter-type", "lo"], {"lora", "lokr"}),
    ],
)
def test_the_shell_completes(words, completed):
    environment = os.environ | {"_ACESTEP_TRAIN_COMPLETE": "bash_complete"}
    environment |= {"COMP_WORDS": " ".join(["acestep-train", *words]), "COMP_CWORD": str(len(words))}
    done = subprocess.run(COMMAND, capture_output=True, text=True, env=environment)
    assert {line.partition(",")[2] for line in done.stdout.splitlines()} == completed


def test_the_shells_script_is_printed():
    environment = os.environ | {"_ACESTEP_TRAIN_COMPLETE": "zsh_source"}
    done = subprocess.run(COMMAND, capture_output=True, text=True, env=environment)
    assert "acestep-train" in done.stdout and "_ACESTEP_TRAIN_COMPLETE" in done.stdout
