"""Numbers and sentences as people write them: one song, and one full stop at the end."""

from __future__ import annotations

import re
import shutil

import pytest
from click.testing import CliRunner

from sidestep_plugin.cli import cli
from sidestep_plugin.text import counted, sentence

NOUNS = (
    "song", "step", "epoch", "checkpoint", "layer", "tensor", "validation", "optimizer step", "training step", "file",
    "clip", "block", "batch", "minute", "model", "row", "track", "process", "GPU",
)  # fmt: skip


def test_one_and_several():
    assert [counted(number, "song") for number in (0, 1, 2)] == ["0 songs", "1 song", "2 songs"]
    assert [counted(number, "process") for number in ("1", "2")] == ["1 process", "2 processes"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("disk full", "disk full."),
        ("disk full.", "disk full."),
        ("disk full..", "disk full."),
        ("\n disk\n full:\n", "disk full."),
        ("really?", "really?"),
        ("", "."),
    ],
)
def test_a_sentence_ends_once(text, told):
    assert sentence(text) == told


@pytest.mark.slow
def test_a_training_of_one_song_one_step_and_one_checkpoint(checkout, trainer, tmp_path, monkeypatch):
    """Everything that is printed about it, by the commands that look at it, too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sidestep_plugin.cli.quiet.quiet_upstream", lambda: None)
    (tmp_path / "songs").mkdir()
    shutil.copy(checkout.tensors / "song_01.pt", tmp_path / "songs")
    shutil.copytree(tmp_path / "songs", tmp_path / "held out")
    (tmp_path / "held out" / "song_01.pt").unlink()
    shutil.copy(checkout.tensors / "song_02.pt", tmp_path / "held out")
    models = [f"--acestep-root={checkout.root}", f"--checkpoint-dir={checkout.checkpoints}", "--model=base"]
    line = ["train", "--plugin=sidestep", *models, "--dataset-dir=songs", "--output-dir=out", "--device=cpu"]
    line += ["--epochs=1", "--save-every=1", "--gradient-accumulation=1", "--rank=1", "--alpha=1", "--warmup-steps=1"]
    line += ["--validation-dir=held out", "--trigger=zzk", "--target-modules=q_proj", "--num-inference-steps=1"]
    lines = [
        line,
        [*line, "--resume-from=latest"],
        [*line, "--overwrite", "--crop-seconds=0.2", "--num-workers=1"],
        ["list", "out"],
        ["inspect", "out"],
        ["estimate", *models, "--dataset-dir=songs"],
        ["compare", "out", *models, "--dataset-dir=held out", "--device=cpu"],
        ["preview", "out", *models, "--dataset-dir=songs", "--device=cpu", "--songs=1", "--seconds=0.2"],
        ["preview", "out", *models, "--dataset-dir=songs", "--device=cpu", "--songs=2"],
        ["export", "out", "--to=universal"],
        ["schedule", "--steps=1"],
        ["recommended", "--songs=1"],
    ]
    for words in lines:
        done = CliRunner().invoke(cli, words, catch_exceptions=False)
        said = done.output + done.stderr
        assert not re.search(rf"\b(?<![.,:/-])1 ({'|'.join(NOUNS)})e?s\b", said), (words[0], said)
        assert not re.search(r"(?<!\.)\.\.(?![./])", said), (words[0], said)
        assert "Traceback" not in said


def test_a_training_that_was_saved_after_one_step(checkout, trainer, tmp_path, monkeypatch):
    monkeypatch.setattr("sidestep_plugin.cli.quiet.quiet_upstream", lambda: None)
    compute, calls = trainer.F.mse_loss, []

    def fails_in_the_second_step(*arguments, **more):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of luck")
        return compute(*arguments, **more)

    monkeypatch.setattr(trainer.F, "mse_loss", fails_in_the_second_step)
    line = ["train", "--plugin=sidestep", f"--acestep-root={checkout.root}", f"--checkpoint-dir={checkout.checkpoints}"]
    line += ["--model=base", f"--dataset-dir={checkout.tensors}", f"--output-dir={tmp_path / 'out'}", "--device=cpu"]
    done = CliRunner().invoke(cli, [*line, "--epochs=1", "--gradient-accumulation=1"], catch_exceptions=False)
    assert "Saved as it was after 1 training step:" in done.output, done.output
