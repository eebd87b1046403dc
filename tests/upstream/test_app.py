"""ACE-Step's own app and HTTP server train with the plugin: in a patched checkout, and under ``acestep-train run``.

The functions are upstream's (``start_training`` behind the app's button, the route ``/v1/training/start``), called as
upstream calls them, in a process of its own, on tiny models; two models one after the other in one process.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sidestep_plugin.engine import checkout_patch as patching
from sidestep_plugin.timesteps.schedule import inference_timesteps

pytestmark = pytest.mark.upstream
JOB = Path(__file__).with_name("app_job.py")
MODELS = ["acestep-v15-base", "acestep-v15-turbo", "acestep-v15-sft"]


@pytest.fixture
def copy(checkout, tmp_path):
    """A copy of the checkout's package that may be changed."""
    shutil.copytree(
        checkout.root / "acestep", tmp_path / "copy" / "acestep", ignore=shutil.ignore_patterns("__pycache__")
    )
    return tmp_path / "copy"


@pytest.fixture
def job(checkout, tmp_path):
    """Run the job in a process of its own, as a module on its path would | returns the record and what was printed."""
    work = tmp_path / "work"  # upstream's path guard accepts what lies under the current directory
    shutil.copytree(checkout.tensors, work / "tensors")

    def run(root, how, *front, environment=None, hide=False, models=MODELS):
        stand_in = work / "stand-in"
        (stand_in / "torchaudio").mkdir(parents=True, exist_ok=True)
        (stand_in / "torchaudio" / "__init__.py").write_text("from . import transforms\n", encoding="utf-8")
        (stand_in / "torchaudio" / "transforms.py").write_text("", encoding="utf-8")
        # A meta path entry that knows no sidestep_plugin: what an environment without it looks like.
        hidden = "import sys\nsys.modules['sidestep_plugin'] = None\n" if hide else ""
        (stand_in / "sitecustomize.py").write_text(hidden, encoding="utf-8")
        report = work / "report.json"
        words = [str(JOB), str(report), how, str(checkout.checkpoints), "tensors", *models]
        path = os.pathsep.join([str(stand_in), str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
        done = subprocess.run(
            [*(front or [sys.executable]), *words],
            cwd=work,
            env=os.environ | {"PYTHONPATH": path, "PYTHONUTF8": "1"} | (environment or {}),
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=300,
        )
        if "has no start_training" in done.stderr or "train_api_lora_start_route" in done.stderr:
            pytest.skip(f"this version has no {how} training")
        if missing := re.search(r"ModuleNotFoundError: No module named '((?!acestep|sidestep)[\w.]+)'", done.stderr):
            pytest.skip(f"ACE-Step's own {how} code needs {missing[1]}: pip install it to run this test")
        assert done.returncode == 0, done.stderr[-3000:]
        return {entry["model"]: entry for entry in json.loads(report.read_text(encoding="utf-8"))}, work

    return run


def assert_right(trained, work):
    """base and sft at their own law with dropout, turbo at its 8 steps without; the log says so first."""
    table = [round(t, 3) for t in inference_timesteps(3.0, 8)]
    for number, name in enumerate(MODELS):
        entry = trained[name]
        discrete = sum(round(t, 3) in table for t in entry["t"])
        assert len(entry["t"]) >= 24, entry["messages"][-3:]
        assert "❌" not in "".join(entry["messages"])
        if name.endswith("turbo"):
            assert discrete == len(entry["t"]) and not any(entry["dropped"])
        else:
            assert discrete <= 1 and any(entry["dropped"]) and not all(entry["dropped"])
        decided = [line for line in entry["log"] if "Model: " in line]
        assert len(decided) == 1 and f"variant {name.rpartition('-')[2]}" in decided[0]
        first = next(at for at, line in enumerate(entry["log"]) if "Step 0" in line or "Model: " in line)
        assert "Model: " in entry["log"][first] or "Starting" in entry["log"][first]
        assert any("shift 2.0 was set in the training tab" in line for line in entry["log"])
        (facts,) = (work / "output" / str(number)).glob("final/**/training_config.json")
        assert json.loads(facts.read_text(encoding="utf-8"))["model_variant"] == name.rpartition("-")[2]


def assert_upstreams_own(trained, work):
    table = [round(t, 3) for t in inference_timesteps(3.0, 8)]
    for entry in trained.values():
        assert all(round(t, 3) in table for t in entry["t"]) and not any(entry["dropped"])
    assert not list((work / "output").rglob("training_config.json"))


@pytest.mark.parametrize("how", ["gradio", "http"])
def test_a_patched_checkout_trains_each_model_right(copy, job, how):
    assert patching.apply(copy)
    assert_right(*job(copy, how))


@pytest.mark.parametrize("how", ["gradio", "http"])
def test_run_trains_each_model_right(checkout, job, how):
    run = [sys.executable, "-c", "from sidestep_plugin.cli import main; main()", "run", "--plugin", "sidestep"]
    assert_right(*job(checkout.root, how, *run, "--acestep-root", str(checkout.root), "--"))


def test_the_apps_stop_button_saves_and_the_app_goes_on_from_there(copy, job):
    assert patching.apply(copy)
    trained, work = job(copy, "stop", models=MODELS[:1])
    messages = trained[MODELS[0]]["messages"]
    assert "❌" not in "".join(messages), messages
    assert (work / "output" / "0" / "interrupted" / "resume_state.pt").is_file()
    assert any("Saved as it was after 10 training steps" in line for line in trained[MODELS[0]]["log"] + messages)
    assert any(
        re.search(r"Resumed: (\d+) of \1 tensors of the adapter, after epoch 5, 10 training", line) for line in messages
    )
    assert list((work / "output" / "0").glob("final/**/*.safetensors"))


@pytest.mark.parametrize("without", ["not installed", "no plugins named", "not patched", "reverted"])
def test_without_the_plugin_the_app_trains_as_before(copy, job, without):
    before = (copy / patching.TARGET).read_bytes()
    if without != "not patched":
        patching.apply(copy)
    if without == "reverted":
        assert patching.revert(copy) and (copy / patching.TARGET).read_bytes() == before
    environment = {"ACESTEP_PLUGINS": ""} if without == "no plugins named" else None
    assert_upstreams_own(*job(copy, "gradio", environment=environment, hide=without == "not installed"))


def test_what_cannot_be_attached_stops_the_training_and_not_the_app(copy, job):
    patching.apply(copy)
    trained, _ = job(copy, "gradio", environment={"ACESTEP_PLUGINS": "nothing-like-it"})
    for entry in trained.values():
        assert not entry["t"]
        assert "No plugin 'nothing-like-it' is installed" in "".join(entry["messages"])
