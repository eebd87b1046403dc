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
from conftest import COMMAND, without_training_packages

from sidestep_plugin import miniature
from sidestep_plugin.cli import cli
from sidestep_plugin.engine.compatibility import injection_problem


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
        r"^Verdict: Compatible: LoRA( and LoKr)? can be trained\.$",
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


@pytest.mark.slow
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


# -- what is installed beside PEFT -----------------------------------------------------------------------------------


@pytest.fixture
def old_torchao(tmp_path):
    """An environment for a new process in which torchao is installed and older than PEFT allows."""
    pytest.importorskip("peft")
    site = tmp_path / "site"
    parts = {
        "torchao/__init__.py": "",
        "torchao/prototype/__init__.py": "",
        "torchao/prototype/safetensors/__init__.py": "",
        "torchao/prototype/safetensors/safetensors_support.py": "flatten_tensor_state_dict = None\n",
        "torchao-0.3.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: torchao\nVersion: 0.3.0\n",
    }
    for name, text in parts.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text, encoding="utf-8")
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path}


@pytest.mark.slow
def test_a_lora_that_peft_refuses_is_said_by_check_and_before_a_model_is_loaded(tmp_path, old_torchao):
    built = miniature.build(tmp_path / "miniature", models=["acestep-v15-base"])
    folders = ["--acestep-root", str(built.root), "--checkpoint-dir", str(built.checkpoints)]
    training = ["--plugin", "sidestep", "--model", "base", "--dataset-dir", str(built.tensors)]
    training += ["--output-dir", str(tmp_path / "output"), "--device", "cpu"]
    for line, code in ((["check", "--adapter-type", "lora", *folders], 1), ([*training, *folders], 2)):
        done = subprocess.run(
            [*COMMAND, *line], env=old_torchao, capture_output=True, text=True, encoding="utf-8", timeout=300
        )
        said = (done.stdout if code == 1 else done.stderr).splitlines()[-1]
        assert done.returncode == code, done.stdout + done.stderr
        assert "incompatible version of torchao. Found version 0.3.0" in said
        assert 'pip install --upgrade "torchao>=' in said and "pip uninstall torchao" in said
        assert "Loading" not in done.stdout and "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_trying_an_adapter_leaves_no_trace(kind, require_kind):
    import torch

    require_kind(kind)
    before = torch.get_rng_state()
    assert injection_problem(kind) == ""
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("kind", "way_out"), [("lora", "pip install --upgrade peft"), ("lokr", "pip install --upgrade lycoris-lora")]
)
def test_a_package_that_cannot_be_imported_is_installed_again(monkeypatch, kind, way_out):
    monkeypatch.setitem(sys.modules, "peft" if kind == "lora" else "lycoris", None)
    assert injection_problem(kind).endswith(way_out) and "Error: import of" in injection_problem(kind)
