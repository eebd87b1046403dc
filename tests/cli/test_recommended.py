"""Recommended settings: one table, used by the command and by the guided start."""

from __future__ import annotations

import json
import sys

import pytest
from click.testing import CliRunner

from sidestep_plugin.cli import cli
from sidestep_plugin.recommended import accumulation_for, recommended, save_every_for, warmup_for


def run(*words):
    done = CliRunner().invoke(cli, ["recommended", *map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize(
    ("songs", "kind", "epochs", "rate", "accumulation", "warmup"),
    [
        (1, "lora", 800, 1e-4, 1, 80),
        (13, "lora", 800, 1e-4, 1, 100),
        (20, "lora", 800, 1e-4, 4, 100),
        (21, "lora", 500, 1e-4, 3, 100),
        (100, "lora", 500, 1e-4, 4, 100),
        (1300, "lora", 100, 1e-4, 4, 100),
        (12, "lokr", 500, 0.03, 4, 100),
        (1300, "lokr", 100, 0.03, 4, 100),
    ],
)
def test_the_table(songs, kind, epochs, rate, accumulation, warmup):
    values = {name: setting.value for name, setting in recommended(songs, kind).items()}
    assert values == {
        "epochs": epochs,
        "rank": 64,
        "alpha": 128,
        "learning_rate": rate,
        "batch_size": 1,
        "gradient_accumulation": accumulation,
        "warmup_steps": warmup,
        "save_every": epochs // 10,
    }
    assert all(len(setting.reason.split()) > 3 for setting in recommended(songs, kind).values())


def test_warm_up_is_at_most_a_tenth_of_the_training():
    for songs, epochs in ((12, 4), (12, 40), (3, 1), (100, 500)):
        accumulation = accumulation_for(songs, 1)
        total = epochs * songs // accumulation
        assert 0 <= warmup_for(songs, 1, epochs, accumulation) <= min(100, total / 10)
    assert save_every_for(3) == 1


def test_it_is_printed_as_options_that_the_training_takes():
    text = run("--songs", 13)
    line = text.splitlines()[-1].split()
    assert line.pop(0) == "acestep-train"
    from sidestep_plugin.cli.train import train

    parsed = train.make_context("train", line).params
    for name, setting in recommended(13).items():
        assert parsed[name] == setting.value
        assert setting.reason in text
    printed = json.loads(run("--songs", 13, "--json"))
    assert printed["epochs"]["value"] == 800 and "13 songs" in printed["epochs"]["reason"]


def test_its_values_need_no_torch_and_no_click():
    import subprocess

    code = "import sys, sidestep_plugin.recommended; print({'torch', 'click', 'pluggy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
