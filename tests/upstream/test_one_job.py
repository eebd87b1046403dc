"""The job that ``history.py`` repeats on every version of the trainer, on the miniature: it must not rot unseen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

JOB = Path(__file__).with_name("one_job.py")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["base", "turbo"])
def test_the_job_trains_and_its_record_is_judged_right(checkout, tmp_path, monkeypatch, model):
    monkeypatch.syspath_prepend(str(JOB.parent))
    import history

    options = {
        "--acestep-root": checkout.root,
        "--checkpoint-dir": checkout.checkpoints,
        "--model": model,
        "--dataset-dir": checkout.tensors,
        "--output-dir": tmp_path / "output",
        "--epochs": history.EPOCHS,
        "--batch-size": 2,
        "--gradient-accumulation": 1,
        "--rank": 4,
        "--learning-rate": 1e-3,
        "--save-every": history.EPOCHS // 2,
        "--seed": 7,
        "--device": "cpu",
    }
    if model == "base":
        options["--cfg-ratio"] = history.CFG_RATIO
    words = [str(word) for pair in options.items() for word in pair]
    line = [sys.executable, "-W", "ignore", str(JOB), str(tmp_path / "report.json"), "plugin", *words]
    done = subprocess.run(line, capture_output=True, encoding="utf-8", cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["exit"] == 0 and history.problems_of(report, model) == []
