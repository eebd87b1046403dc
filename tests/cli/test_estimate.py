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
    assert verdict.startswith("12.0 GiB: enough for --plugin sidestep --gradient-checkpointing on")
    rows = [line for line in said.splitlines() if line.endswith((" yes", " no"))]
    assert rows[0].startswith("ACE-Step alone") and rows[0].endswith(" no") and rows[-1].endswith(" yes")


def test_without_a_gpu_it_asks_for_the_memory(estimate, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "Say how much there is: --memory 12GB" in estimate("--model", "base", "--seconds", "60")


def test_free_memory_of_a_gpu_is_asked_for(estimate, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (5 * 2**30, 8 * 2**30))
    assert "5.0 GiB are free: enough for --plugin sidestep" in estimate("--model", "base", "--seconds", "60")


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
            "--target-modules x, y names no layer",
        ),
        (("--model", "my-xl-turbo-thing", "--seconds", "9"), "No model 'my-xl-turbo-thing'"),
        (("--model", "acestep-v15-xl-base-of-mine", "--seconds", "9"), "No model 'acestep-v15-xl-base-of-mine'"),
    ],
)
def test_what_cannot_be_estimated(estimate, words, says):
    assert says in " ".join(estimate(*words, fails=True).split())


def test_the_folder_of_models_counts_outside_of_a_checkout(checkout, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # This process may have imported a checkout.
    monkeypatch.setattr("sidestep_plugin.trainer.checkout._candidates", lambda said: [(tmp_path, "the folder")])
    line = ["estimate", "--model", "base", "--seconds", "9"]
    official = CliRunner().invoke(cli, line, catch_exceptions=False).stdout
    assert "base is not on this machine" in official
    named = [*line, "--checkpoint-dir", str(checkout.checkpoints)]
    for more, variable in ((named, ""), (line, str(checkout.checkpoints))):
        monkeypatch.setenv("ACESTEP_CHECKPOINTS_DIR", variable)
        here = CliRunner().invoke(cli, more, catch_exceptions=False).stdout
        assert "not on this machine" not in here and here.splitlines()[0] != official.splitlines()[0]


def test_a_damaged_song_is_said_and_does_not_count(estimate, checkout, tmp_path):
    songs = shutil.copytree(checkout.tensors, tmp_path / "songs")
    (songs / "manifest.json").unlink(missing_ok=True)
    whole = json.loads(estimate("--model", "base", "--dataset-dir", str(songs), "--json"))
    longest = max(songs.iterdir(), key=lambda file: file.stat().st_size)
    longest.write_bytes(longest.read_bytes()[:-500])
    said = json.loads(estimate("--model", "base", "--dataset-dir", str(songs), "--json"))
    assert said["notes"] == [f"left out, because a training refuses them: {longest.name}."] and not whole["notes"]
