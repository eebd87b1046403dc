"""What other libraries print about themselves is not shown, unless with ``--debug``."""

from __future__ import annotations

import subprocess

import pytest
from click.testing import CliRunner
from conftest import COMMAND

from sidestep_plugin import Refusal
from sidestep_plugin.cli import cli

NOISE = ("[LyCORIS]", "\x1b[0;", "bitsandbytes")


def printed(*words, **more):
    done = subprocess.run([*COMMAND, *map(str, words)], capture_output=True, text=True, encoding="utf-8", **more)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_lokr_trains_without_lycoris_talking(tmp_path):
    pytest.importorskip("lycoris", reason="LoKr needs lycoris-lora: pip install 'sidestep-plugin[upstream]'")
    line = ("demo", "--adapter-type", "lokr", "--dir", tmp_path / "demo", "--epochs", "1")
    assert not [word for word in NOISE if word in printed(*line)]
    assert "[LyCORIS]" in printed(*line, "--debug"), "then this test could not fail"


def test_warnings_about_optional_packages_are_left_out(capsys):
    logger = pytest.importorskip("loguru", reason="ACE-Step's own logger").logger
    from sidestep_plugin.cli.quiet import quiet_upstream

    quiet_upstream()
    try:
        logger.warning("bitsandbytes not installed. Using standard AdamW.")
        logger.warning("something that matters")
        logger.info("news")
    finally:
        logger.remove()
    assert capsys.readouterr().err == "ACE-Step: something that matters\n"


@pytest.mark.slow
def test_check_begins_with_what_was_asked(tmp_path, checkout):
    line = ("check", "--acestep-root", checkout.root, "--checkpoint-dir", checkout.checkpoints)
    assert printed(*line).startswith("ACE-Step: ")


def test_check_says_where_it_looks_before_anything_slow_is_imported(checkout, monkeypatch):
    def slow(**_):
        raise Refusal("torch cannot be imported. Install it.")

    monkeypatch.setattr("sidestep_plugin.cli.torch_here.require_torch", slow)
    done = CliRunner().invoke(cli, ["check", "--acestep-root", str(checkout.root)])
    assert done.exit_code == 2 and done.stdout == f"ACE-Step: {checkout.root}\n"


def test_a_terminal_is_told_what_is_waited_for_and_a_pipe_gets_the_result_only(monkeypatch, capsys):
    from sidestep_plugin.cli import terminal

    terminal.say_what_takes_long("Importing torch ...")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(terminal.sys.stderr, "isatty", lambda: True, raising=False)
    terminal.say_what_takes_long("Importing torch ...")
    assert "Importing torch ..." in capsys.readouterr().err
