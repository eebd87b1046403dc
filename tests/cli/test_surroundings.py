"""What a notebook, a cluster or another framework leaves in the environment does not end or divert the program."""

from __future__ import annotations

import os
import subprocess

import pytest
from click.testing import CliRunner
from conftest import COMMAND

from sidestep_plugin.cli import cli
from sidestep_plugin.cli.surroundings import settle

NOTEBOOK = "module://no_notebook_is_installed_here.backend_inline"
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NAME": "train",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
}


@pytest.mark.slow
def test_the_whole_job_in_a_notebook_on_a_cluster_beside_another_framework(tmp_path):
    surroundings = SLURM | {"MPLBACKEND": NOTEBOOK, "USE_TF": "1", "USE_TORCH": "0"}
    line = [*COMMAND, "demo", "--epochs", "1", "--dir", str(tmp_path / "demo"), "--validate", "1"]
    done = subprocess.run(line, capture_output=True, text=True, encoding="utf-8", env=os.environ | surroundings)
    assert done.returncode == 0, done.stderr
    assert "Adapter: " in done.stdout and "Traceback" not in done.stderr


@pytest.mark.parametrize("backend", [NOTEBOOK, "TkAgg", "no such backend", ""])
def test_our_own_pictures_need_no_window_and_no_notebook(monkeypatch, backend):
    monkeypatch.setenv("MPLBACKEND", backend)
    settle(draws_only_files=True)
    assert os.environ["MPLBACKEND"] == "agg"


@pytest.mark.parametrize(
    ("backend", "kept"),
    [(NOTEBOOK, False), ("TkAgg", True), ("module://json.backend", True), ("inline", None), ("ipympl", None)],
)
def test_a_program_that_is_started_keeps_a_backend_that_is_there(monkeypatch, backend, kept):
    import importlib.util

    monkeypatch.setenv("MPLBACKEND", backend)
    if kept is None:
        kept = importlib.util.find_spec({"inline": "matplotlib_inline"}.get(backend, backend)) is not None
    settle(draws_only_files=False)
    assert os.environ["MPLBACKEND"] == (backend if kept else "agg")


def test_nothing_is_set_that_was_not_there(monkeypatch):
    for name in ("MPLBACKEND", "USE_TF", "USE_TORCH", "SLURM_NTASKS", "SLURM_JOB_NAME"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    settle(draws_only_files=True)
    assert dict(os.environ) == before


def test_every_command_settles_first(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", NOTEBOOK)
    assert CliRunner().invoke(cli, ["schedule"]).exit_code == 0
    assert os.environ["MPLBACKEND"] == "agg"


def test_a_gpu_that_is_hidden_is_said(monkeypatch):
    from sidestep_plugin.engine.models import pick_device
    from sidestep_plugin.errors import Refusal

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(Refusal, match="CUDA_VISIBLE_DEVICES is ''"):
        pick_device("cuda")


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_is_named(checkout, tmp_path):
    (tmp_path / "a file").write_text("", encoding="utf-8")
    unusable = tmp_path / "a file" / "cache"
    surroundings = {"HF_MODULES_CACHE": str(unusable), "HF_HOME": str(unusable)}
    line = [*COMMAND, "demo", "--epochs", "1", "--dir", str(tmp_path / "demo")]
    done = subprocess.run(line, capture_output=True, text=True, encoding="utf-8", env=os.environ | surroundings)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "cannot write there" in done.stderr and str(unusable) in done.stderr and "HF_MODULES_CACHE=" in done.stderr
