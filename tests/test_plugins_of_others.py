"""Plugins that are not ours, really installed with pip: the tutorial's, and one that wants to sample as well."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLUGINS = ROOT / "tests" / "plugins"
PAGE = (ROOT / "docs" / "write-a-plugin.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder into which both plugins were installed by pip, without asking any index."""
    folder = tmp_path_factory.mktemp("installed")
    work = tmp_path_factory.mktemp("sources")
    for name in ("acestep-loss-bands", "acestep-uniform-t"):
        source = work / name
        source.mkdir()
        for file in (PLUGINS / name).iterdir():
            if file.is_file():
                (source / file.name).write_bytes(file.read_bytes())
        line = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--no-build-isolation"]
        done = subprocess.run([*line, "--target", folder, source], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def acestep_train(installed, tmp_path):
    def run(command, **environment):
        path = os.pathsep.join(filter(None, [str(installed), os.environ.get("PYTHONPATH")]))
        line = [sys.executable, "-c", "from sidestep_plugin.cli import main; main()", *command.split()[1:]]
        return subprocess.run(
            line,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": path, "PYTHONUTF8": "1"} | environment,
            capture_output=True,
            text=True,
            encoding="utf-8",
        )

    return run


def test_the_tutorials_code_is_the_installed_package():
    assert ("toml", (PLUGINS / "acestep-loss-bands" / "pyproject.toml").read_text(encoding="utf-8")) in BLOCKS
    for name in ("acestep_loss_bands.py", "test_loss_bands.py"):
        assert ("python", (PLUGINS / "acestep-loss-bands" / name).read_text(encoding="utf-8")) in BLOCKS


@pytest.mark.slow
def test_the_tutorials_steps_print_what_it_says(acestep_train, tmp_path):
    said = [text for kind, text in BLOCKS if kind == "text"]
    assert said[0] == "pip install -e .\nacestep-train plugins\n"
    listed = acestep_train("acestep-train plugins")
    assert said[1] in listed.stdout, listed.stdout
    tried = acestep_train(said[2].strip())
    assert tried.returncode == 0 and said[3] in tried.stdout, tried.stdout + tried.stderr
    with next((tmp_path / "acestep-demo" / "output").glob("*/final/adapter/loss_by_timestep.csv")).open() as file:
        rows = list(csv.DictReader(file))
    steps = int(re.search(r"step (\d+)/\1,", tried.stdout)[1])
    assert len(rows) == 2 and sum(int(row["steps"]) for row in rows) == steps > 0


@pytest.mark.slow
def test_the_tutorials_trace(acestep_train):
    done = acestep_train("acestep-train demo --epochs 1", ACESTEP_TRACE_HOOKS="1")
    (shown,) = [text.strip() for kind, text in BLOCKS if kind == "text" and "sample_timesteps" in text]
    assert shown in done.stderr, done.stderr[-2000:]
    assert "sample_timesteps" not in acestep_train("acestep-train demo --epochs 1", ACESTEP_TRACE_HOOKS="0").stderr


@pytest.mark.slow
def test_the_tutorials_test_passes(installed):
    path = os.pathsep.join(filter(None, [str(installed), os.environ.get("PYTHONPATH")]))
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_loss_bands.py"]
    done = subprocess.run(
        line, cwd=PLUGINS / "acestep-loss-bands", env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_two_samplers_are_refused_unless_the_user_says_which_one_wins(acestep_train, tmp_path):
    both = "acestep-train demo --plugin sidestep --plugin uniform-t"
    refused = acestep_train(both)
    assert refused.returncode == 2
    assert "--wins sidestep or --wins uniform-t" in refused.stderr
    assert not (tmp_path / "acestep-demo").exists()

    ours = acestep_train(f"{both} --wins sidestep")
    assert ours.returncode == 0, ours.stderr
    theirs = acestep_train(f"{both} --wins uniform-t", ACESTEP_TRACE_HOOKS="1")
    assert theirs.returncode == 0, theirs.stderr
    # Only the winner is asked, and what is announced and written is what was done.
    assert "uniform-t.acestep_sample_timesteps(" in theirs.stderr
    assert "sidestep.timesteps.acestep_sample_timesteps(" not in theirs.stderr
    assert "Timesteps: sampled by the plugin uniform-t" in theirs.stdout
    told = acestep_train("acestep-train inspect acestep-demo/output/base-lora").stdout
    assert "timesteps: sampled by the plugin uniform-t, condition dropout 15 %" in told

    nobody = acestep_train(f"{both} --wins loss-bands")
    assert nobody.returncode == 2 and "no plugin of that name takes part" in nobody.stderr
