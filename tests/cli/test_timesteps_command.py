"""``acestep-train timesteps`` and ``schedule`` print what the trainer, the law and the plugin really do."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

from sidestep_plugin.cli import cli
from sidestep_plugin.timesteps import shares as distributions
from sidestep_plugin.timesteps.schedule import inference_timesteps, max_of_two_logit_normal_cdf

# The tables of the turbo model's code, as they are usually written.
TABLES = {
    1.0: [1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125],
    2.0: [1.0, 0.933, 0.857, 0.769, 0.667, 0.545, 0.4, 0.222],
    3.0: [1.0, 0.955, 0.9, 0.833, 0.75, 0.643, 0.5, 0.3],
}


def run(*arguments):
    return CliRunner().invoke(cli, [*map(str, arguments)], catch_exceptions=False)


@pytest.fixture
def timesteps(checkout):
    def ask(model, *more):
        place = ["--acestep-root", checkout.root, "--checkpoint-dir", checkout.checkpoints]
        return run("timesteps", "--model", model, *place, *more)

    return ask


@pytest.mark.parametrize("shift", TABLES)
def test_the_schedule_is_the_turbo_models_table(shift):
    printed = json.loads(run("schedule", "--shift", shift, "--steps", 8, "--json").output)
    assert [round(t, 3) for t in printed["timesteps"]] == TABLES[shift]
    text = run("schedule", "--shift", shift, "--steps", 8).output
    assert text.isascii() and f"Shift {shift:g}, 8 steps" in text
    assert [round(float(word), 3) for word in text.splitlines()[1].split()] == TABLES[shift]


def test_a_schedule_of_nothing_is_refused():
    for arguments in (("--shift", 0), ("--shift", "nan"), ("--steps", 0)):
        done = run("schedule", *arguments)
        assert done.exit_code == 2 and "Invalid value" in done.stderr


@pytest.mark.parametrize("model", ["base", "turbo", "turbo-shift1"])
def test_the_plugins_column_is_what_trains(timesteps, model):
    done = timesteps(model, "--json", "--draws", 50_000)
    assert done.exit_code == 0, done.output
    shown = json.loads(done.output)
    trainer, law, plugin = (shown[name]["shares"] for name in ("trainer", "law", "plugins"))
    for shares in (trainer, law, plugin):
        assert len(shares) == 20 and sum(shares) == pytest.approx(1.0)
    expected = {
        "base": law,
        "turbo": trainer,
        "turbo-shift1": distributions.of_values("", inference_timesteps(1.0, 8), 20).shares,
    }[model]
    assert plugin == pytest.approx(expected, abs=0.01)
    assert law != pytest.approx(trainer, abs=0.05), "then this test could not fail"


def test_the_laws_column_is_its_distribution_function():
    column = distributions.of_the_law("law", -0.4, 1.0, 10)
    for band, share in enumerate(column.shares):
        below, above = (max_of_two_logit_normal_cdf(edge / 10, -0.4, 1.0) for edge in (band, band + 1))
        assert share == pytest.approx(above - below)
    assert (round(column.low, 2), round(column.median, 3), round(column.high, 2)) == (0.24, 0.536, 0.83)


def test_as_text_it_says_what_was_decided_and_fits_a_terminal(timesteps):
    done = timesteps("base", "--draws", 2000)
    assert "variant base" in done.output and "maximum of two logit-normal draws" in done.output
    assert "0.54 (0.24-0.83)" in done.output and "8 values" in done.output
    table = done.output.partition("\n\n")[2]
    assert max(map(len, table.splitlines())) <= 80


def test_where_the_console_has_no_blocks_bars_are_plain(timesteps, monkeypatch):
    plain = distributions.as_text([distributions.of_the_trainer("trainer", 20)])
    assert all(line.isascii() for line in plain) and any("####" in line for line in plain)


def test_another_option_is_another_column(timesteps):
    shares = [
        json.loads(timesteps("base", "--json", "--timestep-mode", mode).output)["plugins"]["values"]
        for mode in ("discrete", "continuous")
    ]
    assert shares == [8, None]


def test_it_draws_from_its_own_seed_only(timesteps):
    torch.manual_seed(1)
    one, other = (timesteps("base", "--json", "--seed", 5).output for _ in range(2))
    assert one == other != timesteps("base", "--json", "--seed", 6).output


@pytest.mark.parametrize("model", ["base", "turbo"])
@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_a_picture(timesteps, tmp_path, model, ending):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install 'sidestep-plugin[plot]'")
    file = tmp_path / f"timesteps.{ending}"
    done = timesteps(model, "--plot", file)
    assert done.exit_code == 0, done.output
    assert f"Picture: {file}" in done.output
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending]
    assert file.read_bytes().startswith(start) and [*tmp_path.iterdir()] == [file]


def test_pictures_that_cannot_be_drawn(timesteps, tmp_path, monkeypatch):
    for file, says in ((tmp_path / "picture.txt", "is not a .png"), (tmp_path / "none" / "a.png", "No folder")):
        done = timesteps("base", "--plot", file)
        assert done.exit_code == 2 and says in done.stderr
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    done = timesteps("base", "--plot", tmp_path / "a.png")
    assert done.exit_code == 2 and "pip install 'sidestep-plugin[plot]'" in done.stderr
    assert not [*tmp_path.iterdir()]


def test_a_model_that_is_not_there(timesteps):
    done = timesteps("no-such-model")
    assert done.exit_code == 2 and "No model 'no-such-model'" in done.stderr
