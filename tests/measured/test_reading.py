"""What follows from measurements, shown with made-up ones; and that nothing is said where there are none."""

from __future__ import annotations

import json
import stat
import sys

import pytest
from click.testing import CliRunner
from measured_table import NOTHING, PAGE, page, tables

from sidestep_plugin import Refusal
from sidestep_plugin.cli import cli
from sidestep_plugin.measured import reading
from sidestep_plugin.measured.reading import ALONE, CARDS, PLUGIN, Card, card_here, measurements, nearest
from sidestep_plugin.memory.estimate import MARGIN, Needs
from sidestep_plugin.memory.known import TWO_B, XL

GIB = 2**30


def a_training(seconds=180.0, step=0.5, way=PLUGIN, adapter="lora", size=TWO_B, allocated=4 * GIB, estimate=4 * GIB):
    return {
        "size": "2b" if size == TWO_B else "xl",
        "decoder_parameters": size.parameters,
        "song_seconds": seconds,
        "rank": 64,
        "adapter": adapter,
        "way": way,
        "seconds_per_step": step,
        "peak_allocated_bytes": allocated,
        "peak_reserved_bytes": allocated + GIB,
        "estimate_bytes": estimate,
    }


def a_report(name="Made-up 24", memory=24, capability=(8, 9), trainings=(), **changed):
    return {
        "schema_version": 1,
        "device": "cuda",
        "card": {"name": name, "memory_bytes": memory * GIB, "compute_capability": list(capability)},
        "measured_on": "2026-11-27",
        "versions": {"torch": "2.11.0", "driver": "580.1", "sidestep-plugin": "0.1.0", "commit": "abc"},
        "trainings": list(trainings) or [a_training(180.0, 0.5), a_training(60.0, 0.2)],
        "others": [],
        "not_measured": [],
        **changed,
    }


@pytest.fixture
def cards(tmp_path, monkeypatch):
    """Make measurements, in a folder that stands in for the package's: ``cards(a_report(), ...)``."""
    folder = tmp_path / "cards"
    folder.mkdir()
    monkeypatch.setattr(reading, "CARDS", folder)
    monkeypatch.setattr(reading, "card_here", lambda: None)

    def make(*reports):
        for number, report in enumerate(reports):
            (folder / f"{number}.json").write_text(json.dumps(report), encoding="utf-8")
        reading._read_all.cache_clear()
        return measurements()

    yield make
    reading._read_all.cache_clear()


# -- the files that are there ------------------------------------------------------------------------------------------


def test_every_file_of_the_package_can_be_read_and_is_in_the_docs():
    for file in CARDS.glob("*.json"):
        assert reading.read(file).trainings, file
    assert PAGE.read_text(encoding="utf-8") == page(), "run python tests/tools/measured_table.py"


def test_nothing_is_said_while_nothing_is_measured(cards):
    assert cards() == () and tables(()) == NOTHING and reading.too_low() == 1.0
    assert reading.training_time(100, parameters=TWO_B.parameters, song_seconds=180) == ""
    assert "Time with" not in CliRunner().invoke(cli, ["recommended"]).output


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"schema_version": 2}, "has schema_version 2, expected 1. Measure again"),
        ({"device": "cpu"}, "was measured on 'cpu', not on a GPU"),
        (
            {"card": {"name": "x"}},
            "is not as python -m sidestep_plugin.gpu_report writes it (KeyError: 'memory_bytes')",
        ),
        ({"trainings": [a_training(step=float("nan"))]}, "(ValueError: seconds_per_step nan)"),
        ({"others": 5}, "TypeError"),
    ],
)
def test_a_file_that_is_something_else_is_refused(cards, changed, says):
    with pytest.raises(Refusal) as refused:
        cards(a_report(**changed))
    assert says in str(refused.value)


def test_a_file_that_is_no_json_is_refused(cards):
    with pytest.raises(Refusal, match="cannot be read"):
        cards("text")


# -- the nearest card --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("card", "name"),
    [
        (Card("Made-up 24", 1, (1, 0)), "Made-up 24"),
        (Card("another", 22 * GIB, (8, 9)), "Made-up 24"),
        (Card("another", 40 * GIB, (8, 0)), "Made-up 40"),
        (Card("another", 24 * GIB, (9, 1)), "Made-up 80"),
        (Card("another", 100 * GIB, (12, 0)), "Made-up 80"),
        (None, "Made-up 24"),
    ],
)
def test_the_nearest_card_is_the_same_one_or_the_one_that_computes_most_alike(cards, card, name):
    made = cards(
        a_report("Made-up 80", 80, (9, 0)), a_report("Made-up 24", 24, (8, 9)), a_report("Made-up 40", 40, (8, 0))
    )
    assert nearest(card, made).card.name == name


def test_no_card_is_nearest_to_none():
    assert nearest(Card("x", 1, (8, 0)), ()) is None


@pytest.mark.skipif(sys.platform == "win32", reason="the made-up driver is a shell script")
@pytest.mark.parametrize(
    ("prints", "found"),
    [
        ("NVIDIA GeForce RTX 4090, 24564, 8.9", Card("NVIDIA GeForce RTX 4090", 24564 * 2**20, (8, 9))),
        ("NVIDIA-SMI has failed", None),
        ("Tesla, [N/A], 7.0", None),
        ("", None),
    ],
)
def test_the_driver_is_asked_which_card_is_here(tmp_path, prints, found):
    program = tmp_path / "smi"
    program.write_text(f"#!/bin/sh\necho '{prints}'\n", encoding="utf-8")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    assert card_here(str(program)) == found


def test_without_a_driver_there_is_no_card(tmp_path):
    assert card_here(str(tmp_path / "not there")) is None


# -- time --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "step"), [(60.0, 0.2), (180.0, 0.5), (120.0, 0.35), (10.0, 0.2), (360.0, 1.0)])
def test_between_two_lengths_it_is_a_straight_line(cards, seconds, step):
    (one,) = cards(a_report())
    found = reading.seconds_per_step(one, parameters=TWO_B.parameters, song_seconds=seconds)
    assert found == pytest.approx(step)


@pytest.mark.parametrize("asked", [{"adapter": "lokr"}, {"way": ALONE}, {"parameters": XL.parameters}])
def test_what_was_not_measured_is_not_known(cards, asked):
    (one,) = cards(a_report())
    assert reading.seconds_per_step(one, **{"parameters": TWO_B.parameters, "song_seconds": 60.0} | asked) is None


def test_a_training_takes_as_long_as_its_songs(cards):
    cards(a_report())
    known = {"parameters": TWO_B.parameters, "song_seconds": 180.0}
    told = "about 1 h 40 min (0.5 s for each song of 180 s, measured on Made-up 24"
    assert reading.training_time(12_000, **known) == f"{told})"
    assert reading.training_time(12_000, card=Card("Made-up 24", 0, (8, 9)), **known) == f"{told})"
    other = reading.training_time(12_000, card=Card("Yours", 0, (8, 9)), **known)
    assert other == f"{told}, the nearest to your Yours)"


@pytest.mark.parametrize(("seconds", "words"), [(40, "40 s"), (1500, "25 min"), (12_000, "3 h 20 min")])
def test_durations_have_few_digits(seconds, words):
    assert reading.duration(seconds) == words


def test_recommended_says_how_long_its_epochs_take(cards):
    cards(a_report(trainings=[a_training(), a_training(adapter="lokr", step=2.0)]))
    lora, lokr = (
        CliRunner().invoke(cli, ["recommended", "--songs", "15", "--adapter-type", kind]).output
        for kind in ("lora", "lokr")
    )
    assert "Time with a 2B model: about 1 h 40 min (0.5 s for each song of 180 s, measured on Made-up 24)" in lora
    assert "about 4 h 10 min" in lokr and "XL" not in lora


def test_the_guided_start_says_how_long_it_will_take(cards, checkout):
    from pathlib import Path

    from sidestep_plugin.cli.guided.answers import Answers
    from sidestep_plugin.cli.guided.summary import _time
    from sidestep_plugin.launch.launch import Request
    from sidestep_plugin.memory.sizes import DecoderSize
    from sidestep_plugin.run import ModelFacts
    from sidestep_plugin.songs.dataset import inspect_dataset

    size = DecoderSize.from_config(ModelFacts.from_folder(checkout.checkpoints / "acestep-v15-base").config)
    request = Request(
        acestep_root=checkout.root,
        checkpoint_dir=checkout.checkpoints,
        model="base",
        dataset_dir=checkout.tensors,
        output_dir=Path("out"),
        plugins=("sidestep",),
    )
    answers = Answers(request, set(), dataset=inspect_dataset(checkout.tensors))
    assert _time(answers, 100) == ""
    cards(a_report(trainings=[a_training(step=3.0, size=size)]))
    assert _time(answers, 100).startswith("about 30 min (3 s for each song of 1 s, measured on Made-up 24")
    assert _time(Answers(request, set()), 100) == ""


# -- memory ------------------------------------------------------------------------------------------------------------


def test_an_estimate_that_was_too_low_on_a_card_leaves_more_free(cards):
    need = Needs(10 * GIB, 0, 0, 0, 0)
    enough = int(10 * GIB * MARGIN) + 1
    cards(a_report(trainings=[a_training(allocated=3 * GIB)]))
    assert need.fits(enough), "an estimate that was too high lowers nothing"
    cards(a_report(trainings=[a_training(), a_training(allocated=5 * GIB), a_training(way="compile", estimate=None)]))
    assert reading.too_low() == 1.25 and not need.fits(enough) and need.fits(int(1.25 * enough))


# -- the page ----------------------------------------------------------------------------------------------------------


def test_the_page_has_a_section_for_each_card(cards):
    hooks = {"what": "hooks", "size": "tiny", "microseconds_added": 81.2, "microseconds_without": 900.0}
    known = {"size": "2b", "song_seconds": 180.0, "peak_allocated_bytes": 5 * GIB, "seconds": 4.0}
    validation = {"what": "validation", "songs": 2, "losses": 32, "in_steps": 8.0} | known
    previews = {"what": "previews", "clips": 2, "clip_seconds": 20.0, "clips_per_minute": 30.0} | known
    lacking = [{"what": "lora, compile, 2b, songs of 180 s", "why": "no time left of --budget 60"}]
    made = cards(a_report(others=[hooks, validation, previews], not_measured=lacking))
    text = tables(made)
    assert "## Made-up 24\n\n24 GiB, driver 580.1, torch 2.11.0, sidestep-plugin 0.1.0 (abc), ACE-Step of an" in text
    assert "| 2B, 180 s | LoRA 64 | plugin | 0.5 | 4.0 GiB | 5.0 GiB | 4.0 GiB |" in text
    assert "a validation of 2 songs (32 losses) takes 4.00 s, as long as 8.0 steps" in text
    assert "30.0 clips of 20 s per minute" in text and "The hooks add 81 µs" in text
    assert "Not measured: lora, compile, 2b, songs of 180 s (no time left of --budget 60)." in text
