"""``acestep-train check``: the verdict, what it rests on, and its exit code."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys

import pytest
from click.testing import CliRunner
from conftest import without_training_packages

from sidestep_plugin import miniature
from sidestep_plugin.cli import cli


@pytest.fixture
def check(monkeypatch):
    monkeypatch.setattr("sidestep_plugin.cli.quiet.quiet_upstream", lambda: None)
    monkeypatch.setattr(logging, "disable", lambda level: None)
    return lambda *arguments: CliRunner().invoke(cli, ["check", *map(str, arguments)], catch_exceptions=False)


def check_elsewhere(root, *arguments):
    """In a process of its own: this one has imported another checkout."""
    line = [sys.executable, "-c", "from sidestep_plugin.cli import main; main()", "check", "--acestep-root", root]
    return subprocess.run(
        [*map(str, line), *arguments],
        env=without_training_packages(os.environ),
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


def test_a_checkout_that_fits(check, checkout, trainer):
    result = check("--acestep-root", checkout.root, "--checkpoint-dir", checkout.checkpoints)
    assert result.exit_code == 0, result.output
    assert "found       sample_discrete_timestep" in result.output
    assert "acestep-v15-sft: sft (config.json: is_turbo = false" in result.output
    assert "sidestep (sidestep-plugin" in result.output
    assert "acestep-v15-turbo-shift1: turbo-shift1 (config.json: is_turbo = true" in result.output
    assert "acestep-v15-turbo: turbo (config.json" in result.output
    assert re.search(
        r"^Verdict: Compatible: LoRA( and LoKr)? can be trained with --plugin sidestep\.$",
        result.output.splitlines()[-1],
    )


def test_no_model_at_all_is_said_and_what_to_do(check, checkout, trainer, tmp_path):
    result = check("--acestep-root", checkout.root, "--checkpoint-dir", tmp_path)
    verdict = result.output.splitlines()[-1]
    assert result.exit_code == 1
    assert verdict.startswith(f"Verdict: No model found in {tmp_path}")
    assert "acestep-download --model acestep-v15-base" in verdict and "--checkpoint-dir DIR" in verdict
    assert "The trainer itself is compatible (LoRA" in verdict


def test_json_holds_the_same(check, checkout, trainer):
    fitness = json.loads(
        check("--acestep-root", checkout.root, "--checkpoint-dir", checkout.checkpoints, "--json").output
    )
    assert fitness["fits"] is True and fitness["versions"]["torch"]
    assert {seam["status"] for seam in fitness["seams"] if seam["without"] or not seam["optional"]} == {"found"}
    assert {model["name"]: model["variant"] for model in fitness["models"]}["acestep-v15-xl-base"] == "base"
    assert {model["name"]: model["variant"] for model in fitness["models"]}["acestep-v15-turbo-shift1"] == "turbo"
    assert {model["name"]: model["member"] for model in fitness["models"]}["acestep-v15-turbo-shift1"] == "turbo-shift1"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("def sample_discrete_timestep(", "def sample_timestep("), "has no sample_discrete_timestep"),
        (
            ("            t, _ = sample_discrete_timestep(", "            t, _ = draw_times("),
            "training_step never calls it",
        ),
        (("import math\n", "import math, nothing_like_it\n"), "No module named 'nothing_like_it'"),
    ],
    ids=["dropped", "never called", "not importable"],
)
def test_a_checkout_that_does_not_fit(tmp_path, change, says):
    root = miniature.write_checkout(tmp_path / "checkout")
    trainer_file = root / "acestep" / "training" / "trainer.py"
    text = trainer_file.read_text(encoding="utf-8")
    assert change[0] in text
    trainer_file.write_text(text.replace(*change), encoding="utf-8")
    done = check_elsewhere(root)
    assert done.returncode == 1, done.stderr
    assert says in done.stdout.splitlines()[-1] and done.stdout.splitlines()[-1].startswith("Verdict: ")
    assert "Traceback" not in done.stderr


def test_an_undecidable_model_is_listed_with_the_reason(check, checkout, trainer, tmp_path):
    miniature.write_model(tmp_path, "my-tune", seed=1, is_turbo=None)
    (tmp_path / "not-a-model").mkdir()
    shown = check("--acestep-root", checkout.root, "--checkpoint-dir", tmp_path).output
    assert "my-tune: unknown (Cannot tell the variant" in shown and "not-a-model" not in shown


def test_no_checkout_is_unusable_input(check, tmp_path):
    result = check("--acestep-root", tmp_path)
    assert result.exit_code == 2 and "No ACE-Step 1.5 found" in result.stderr
