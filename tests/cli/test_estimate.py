"""``acestep-train estimate``: what it prints, in words and as JSON, and what it refuses."""

from __future__ import annotations

import json
import shutil

import pytest
from click.testing import CliRunner

from sidestep_plugin.cli import cli


@pytest.fixture
def estimate(checkout):
    def run(*words, fails=False):
        line = ["estimate", "--acestep-root", str(checkout.root), "--checkpoint-dir", str(checkout.checkpoints)]
        done = CliRunner().invoke(cli, [*line, *words], catch_exceptions=False)
        assert (done.exit_code != 0) is fails, done.output
        return done.stderr if fails else done.stdout

    return run


def test_a_model_that_is_there_is_read_and_the_longest_song_counts(estimate, checkout):
    import torch

    said = json.loads(estimate("--model", "base", "--dataset-dir", str(checkout.tensors), "--memory", "8GB", "--json"))
    songs = [torch.load(file) for file in checkout.tensors.glob("*.pt")]
    assert said["frames"] == max(len(song["target_latents"]) for song in songs)
    assert said["tokens"] == max(len(song["encoder_hidden_states"]) for song in songs)
    assert said["notes"] == [] and said["free_bytes"] == 8 * 2**30
    assert said["flags"] == ["--gradient-checkpointing off"]
    assert all(row["fits"] for row in said["rows"])


def test_a_card_that_is_too_small_is_told_the_cheapest_flags(estimate):
    said = estimate("--model", "xl-turbo", "--seconds", "180", "--rank", "64", "--batch-size", "2", "--memory", "12GB")
    assert "Model: xl-turbo, 4,168,897,088 parameters" in said
    assert "Note: xl-turbo is not on this machine" in said and "guessed" in said
    *_, verdict = said.splitlines()
    assert verdict.startswith("12.0 GiB: enough with --gradient-checkpointing on")
    rows = [line for line in said.splitlines() if line.endswith((" yes", " no"))]
    assert rows[0].startswith("ACE-Step alone") and rows[0].endswith(" no") and rows[-1].endswith(" yes")


def test_the_mean_that_a_training_keeps_is_counted(estimate):
    words = ["--model", "base", "--seconds", "60", "--rank", "64", "--json"]
    without, averaged = (json.loads(estimate(*words, *more))["rows"][-1] for more in ([], ["--average"]))
    assert averaged["adapter"] == 2 * without["adapter"]
    assert averaged["total"] - without["total"] == without["adapter"]


def test_without_a_gpu_it_asks_for_the_memory(estimate, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "Say how much there is: --memory 12GB" in estimate("--model", "base", "--seconds", "60")


def test_free_memory_of_a_gpu_is_asked_for(estimate, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (5 * 2**30, 8 * 2**30))
    assert "5.0 GiB are free: enough with --gradient-checkpointing off" in estimate(
        "--model", "base", "--seconds", "60"
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--model", "base"), "Give either --dataset-dir DIR or --seconds S."),
        (("--model", "base", "--seconds", "9", "--dataset-dir", "."), "Give either --dataset-dir DIR or --seconds S."),
        (("--model", "jazz", "--seconds", "9"), "No model 'jazz'"),
        (("--model", "base", "--dataset-dir", "nowhere"), "No songs in nowhere"),
        (("--model", "base", "--seconds", "9", "--memory", "12 apples"), "Expected one such as 12GB."),
        (("--model", "base", "--seconds", "9", "--target-modules", "x"), "Choose from down_proj, gate_proj, k_proj"),
        (
            ("--model", "base", "--seconds", "9", "--target-modules", "q_proj,x,y"),
            "--target-modules: x, y names no layer",
        ),
        (("--model", "my-xl-turbo-thing", "--seconds", "9"), "No model 'my-xl-turbo-thing'"),
    ],
)
def test_what_cannot_be_estimated(estimate, words, says):
    assert says in " ".join(estimate(*words, fails=True).split())


def test_a_damaged_song_is_left_out_and_named(estimate, checkout, tmp_path):
    """The longest one, cut off in the middle: the estimate would be too small without a word."""

    shutil.copytree(checkout.tensors, tmp_path / "songs")
    file = max((tmp_path / "songs").glob("*.pt"), key=lambda file: file.stat().st_size)
    file.write_bytes(file.read_bytes()[:-400])
    words = ("--model", "base", "--dataset-dir", str(tmp_path / "songs"), "--memory", "8GB", "--json")
    (note,) = json.loads(estimate(*words))["notes"]
    assert note.startswith(f"{file.name} cannot be read") and note.endswith("a training refuses it.")


def test_the_table_fits_a_narrow_terminal(monkeypatch):
    from sidestep_plugin.cli import estimate as command

    line = ["estimate", "--model=base", "--seconds=60", "--memory=6GB"]
    wide = CliRunner().invoke(cli, line).stdout.splitlines()
    monkeypatch.setattr(command, "columns", lambda: 79)
    narrow = CliRunner().invoke(cli, line).stdout.splitlines()
    (head,) = (number for number, text in enumerate(wide) if text.split()[:2] == ["weights", "adapter"])
    again = next(number for number, text in enumerate(narrow) if text.split()[:2] == ["weights", "adapter"])
    assert len(wide[head]) > 79 >= max(len(text) for text in narrow[again : again + 3])
    name, numbers = narrow[again + 1 : again + 3]
    assert wide[head + 1].split() == [*name.split(), *numbers.split()] and len(numbers) == len(narrow[again])
