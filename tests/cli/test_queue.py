"""Several trainings one after the other: ``acestep-train --queue a.toml b.toml``."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest
from click.testing import CliRunner
from conftest import COMMAND, running, without_training_packages

from sidestep_plugin.cli import cli
from sidestep_plugin.cli.queueing import files_in


@pytest.mark.parametrize(
    ("words", "files", "rest"),
    [
        (["--queue", "a.toml", "b.toml"], ["a.toml", "b.toml"], []),
        (["--queue", "a.toml", "b.toml", "--device", "cpu"], ["a.toml", "b.toml"], ["--device", "cpu"]),
        (["--model", "base", "--queue", "a.toml"], ["a.toml"], ["--model", "base"]),
        (["--queue=a.toml", "--queue", "b.toml"], ["a.toml", "b.toml"], []),
        (["--model", "base"], [], ["--model", "base"]),
    ],
)
def test_all_words_up_to_the_next_option_are_files(words, files, rest):
    assert files_in(words) == (files, rest)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"a.toml": 'model = "base"', "b.toml": "model ="}, "b.toml is not TOML"),
        ({"a.toml": 'model = "base"'}, "Cannot read b.toml"),
    ],
)
def test_a_file_that_cannot_be_read_is_found_before_the_first_training(tmp_path, monkeypatch, files, says):
    monkeypatch.chdir(tmp_path)
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    done = CliRunner().invoke(cli, ["--queue", "a.toml", "b.toml"])
    assert done.exit_code == 2 and says in done.stderr and "---" not in done.output
    done = CliRunner().invoke(cli, ["--queue", "a.toml", "--config", "a.toml"])
    assert done.exit_code == 2 and "Leave --config out" in done.stderr


@pytest.mark.slow
def test_one_that_is_refused_does_not_stop_the_next(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.toml").write_text(f'output-dir = "{name}"\ndataset-dir = "nowhere"\n', encoding="utf-8")
    line = [*COMMAND, "--queue", "a.toml", "b.toml", "--acestep-root=nowhere", "--model=base"]
    environment = without_training_packages(os.environ | {"PYTHONUTF8": "1"})
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("No ACE-Step 1.5 found") == 2
    assert "--- Training 2 of 2: b.toml\n" in done.stdout and "--- 0 of 2 trainings finished\n" in done.stdout
    assert done.stdout.count("refused, nothing was trained") == 2


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
def test_a_whole_queue_and_one_that_is_stopped(tmp_path):
    from sidestep_plugin import miniature

    built = miniature.build(tmp_path, songs=4)
    settings = f'model = "base"\ndataset-dir = "{built.tensors}"\nacestep-root = "{built.root}"\nrank = 4\n'
    for name, epochs in (("short", 1), ("long", 100_000), ("last", 1)):
        text = f'{settings}output-dir = "{name}"\nepochs = {epochs}\nsave-every = 1\n'
        (tmp_path / f"{name}.toml").write_text(text, encoding="utf-8")
    line = [*COMMAND, "--device=cpu", "--queue", "short.toml", "missing.toml", "long.toml", "last.toml"]
    (tmp_path / "missing.toml").write_text(settings.replace(str(built.tensors), "nowhere"), encoding="utf-8")
    environment = os.environ | {"PYTHONUTF8": "1"}
    with running(line, cwd=tmp_path, env=environment, stderr=subprocess.STDOUT) as queue:
        said = ""
        for text in queue.stdout:
            said += text
            if "Training 3 of 4" in said and "epoch 3/" in text:
                break
        queue.send_signal(signal.SIGINT)
        said += queue.communicate()[0]
    assert queue.returncode == 130, said
    endings = [line.split("  ")[-1].partition(",")[0].strip() for line in said.splitlines()[-4:]]
    assert endings == ["finished", "refused", "stopped and saved", "not started"], said
    assert (tmp_path / "short" / "final").is_dir() and (tmp_path / "long" / "interrupted").is_dir()
    assert not (tmp_path / "last").exists()
