"""``--devices``, ``--nodes`` and torchrun: what is started, how it ends, and that nothing is left running."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import running
from safetensors.torch import load_file
from several_gpus.processes import free_port

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="looks at processes and sends signals")]

MODULE = [sys.executable, "-m", "sidestep_plugin"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
MEDDLER = """
import os, time
from sidestep_plugin import hookimpl
from pathlib import Path

def at(name, step):
    return os.environ.get(name) == f"{step.run.ranks.rank}:{step.run.steps}"

@hookimpl
def acestep_step_finished(step):
    Path(os.environ["PLACE"], f"pid-{step.run.ranks.rank}").write_text(str(os.getpid()))
    with Path(os.environ["PLACE"], f"losses-{step.run.ranks.rank}").open("a") as file:
        print(float(step.loss), file=file)
    time.sleep(float(os.environ.get("SLOW", "0")))
    if at("FAIL", step):
        raise RuntimeError("made to fail")
    if at("KILL", step):
        os.kill(os.getpid(), 9)
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a plugin that slows steps down, fails or is killed, as environment variables say."""
    (tmp_path / "lib" / "meddler-1.dist-info").mkdir(parents=True)
    (tmp_path / "lib" / "meddler.py").write_text(MEDDLER, encoding="utf-8")
    about = tmp_path / "lib" / "meddler-1.dist-info"
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: meddler\nVersion: 1\n", encoding="utf-8")
    (about / "entry_points.txt").write_text("[acestep.plugins]\nmeddler = meddler\n", encoding="utf-8")
    if importlib.util.find_spec("torchaudio") is None:  # a real checkout imports it, and calls nothing of it here
        (tmp_path / "lib" / "torchaudio" / "transforms").mkdir(parents=True)
        (tmp_path / "lib" / "torchaudio" / "transforms" / "__init__.py").touch()
        start = "from . import transforms\n__version__ = '0'\n"
        (tmp_path / "lib" / "torchaudio" / "__init__.py").write_text(start, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "lib"))
    monkeypatch.setenv("PLACE", str(tmp_path))
    for name in ("FAIL", "KILL", "SLOW", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def line(checkout, place):
    """The arguments of a training: ``line("--devices", 2)``."""

    def make(*more, output="output"):
        fixed = ["--plugin", "sidestep", "--plugin", "meddler", "--model", "base", "--device", "cpu", "--yes"]
        fixed += ["--acestep-root", checkout.root, "--checkpoint-dir", checkout.checkpoints]
        fixed += ["--dataset-dir", checkout.tensors, "--output-dir", place / output, "--rank", 4, "--alpha", 8]
        fixed += ["--epochs", 4, "--save-every", 1, "--gradient-accumulation", 1, "--warmup-steps", 1]
        return [str(word) for word in (*fixed, *more)]

    return make


def run(words, **environment):
    """Run a command to its end | returns exit code and output; nobody that it started is left."""
    with running(words, stderr=subprocess.STDOUT, env=os.environ | environment, start_new_session=True) as process:
        out = process.communicate()[0]
    return process.returncode, out


def adapter(output):
    return load_file(output / "final" / "adapter" / "adapter_model.safetensors")


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def alive(pid):
    with suppress(OSError):
        os.kill(pid, 0)
        status = Path(f"/proc/{pid}/stat")  # a zombie has ended; systems without /proc do not tell
        return not status.parent.parent.is_dir() or status.read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def workers(place, number=2, *, seconds=90.0):
    """The process ids of the workers, once all of them train."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(OSError, ValueError):
            return [int((place / f"pid-{rank}").read_text()) for rank in range(number)]
        time.sleep(0.1)
    raise AssertionError("no training began")


def all_gone(pids, *, seconds=60.0):
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not any(map(alive, pids))


def test_torchrun_and_devices_train_the_same(line, place):
    code, ours = run([*MODULE, *line("--devices", 2)])
    assert code == 0, ours
    code, its = run([*TORCHRUN, "--nproc-per-node", "2", "-m", "sidestep_plugin", *line(output="torchrun")])
    assert code == 0, its
    assert equal(adapter(place / "output"), adapter(place / "torchrun"))
    for out in (ours, its):
        for once in ("Loading acestep", "Model:", "Devices: 2", "Checkpoint saved at epoch 1", "Adapter: ", "Report: "):
            assert out.count(once) == 1, out
    text = (place / "output" / "final" / "adapter" / "training_options.toml").read_text(encoding="utf-8")
    assert "devices = 2" in text and "rendezvous" not in text


def test_the_page_is_about_all_processes(line, place):
    """Losses are their mean and rows their sum; steps are those of each, and it says so."""
    from sidestep_plugin.report.page import page, read_page

    code, out = run([*MODULE, *line("--devices", 2, "--validate", 2, "--preview-every", 4, "--preview-songs", 1)])
    assert code == 0, out
    data = read_page(place / "output" / "index.html")
    assert data["state"] == "finished" and (data["epochs_done"], len(data["songs"]), len(data["held_out"])) == (4, 4, 2)
    losses = [[float(word) for word in (place / f"losses-{rank}").read_text().split()] for rank in (0, 1)]
    assert [len(own) for own in losses] == [8, 8] and losses[0] != losses[1]
    means = [sum(sum(own[at : at + 2]) for own in losses) / 4 for at in range(0, 8, 2)]
    assert [entry["loss"] for entry in data["report"]["loss_by_epoch"]] == pytest.approx(means, abs=1e-5)
    assert (data["steps"], data["report"]["training_steps"], data["report"]["rows"]) == (8, 8, 16)
    text = re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", page(data)))
    assert "4 / 4 8 steps in each of 2 processes" in text
    assert "Processes 2" in text and "GPUs" not in text
    assert [row["epoch"] for row in data["report"]["previews"]["rows"]] == [0, 4]


def test_two_machines_on_one(line, place):
    """Two launchers that know of each other only by an address."""
    meet = f"127.0.0.1:{free_port()}"
    several = ("--devices", 1, "--nodes", 2, "--rendezvous", meet)
    with running([*MODULE, *line(*several, "--node-rank", 1)], stderr=subprocess.STDOUT) as second:
        code, out = run([*MODULE, *line(*several, "--node-rank", 0)])
        assert code == 0, out
        assert second.wait(60) == 0 and "Adapter" not in second.stdout.read()
    assert "Devices: 2 (1 on each of 2 machines" in out
    assert run([*MODULE, *line("--devices", 2, output="one machine")])[0] == 0
    assert equal(adapter(place / "output"), adapter(place / "one machine"))


@pytest.mark.parametrize(
    "to, number",
    [
        ("launcher", signal.SIGINT),
        ("launcher", signal.SIGTERM),
        ("launcher", signal.SIGHUP),
        (1, signal.SIGTERM),
        (1, signal.SIGUSR1),
    ],
)
def test_a_signal_stops_all_and_saves_once(line, place, monkeypatch, to, number):
    """Then the training is resumed, and gives the adapter of one that was not stopped."""
    monkeypatch.setenv("SLOW", "0.3")
    with running([*MODULE, *line("--devices", 2)], stderr=subprocess.STDOUT) as process:
        pids = workers(place)
        os.kill(process.pid if to == "launcher" else pids[to], number)
        out = process.communicate()[0]
    assert process.returncode == 130, out
    assert out.count("Stopping after this step, and saving.") == 1 == out.count("Saved as it was after"), out
    assert "To resume:" in out and "--devices 2" in out and "Traceback" not in out
    assert all_gone(pids, seconds=10)
    monkeypatch.setenv("SLOW", "0")
    code, out = run([*MODULE, *line("--devices", 2, "--resume-from", "latest")])
    assert code == 0 and "Resuming from" in out, out
    assert run([*MODULE, *line("--devices", 2, output="whole")])[0] == 0
    assert equal(adapter(place / "output"), adapter(place / "whole"))


@pytest.mark.parametrize("launcher", ["devices", "torchrun"])
def test_a_process_that_fails_ends_the_training(line, place, launcher):
    words = [*MODULE, *line("--devices", 2)]
    if launcher == "torchrun":
        words = [*TORCHRUN, "--nproc-per-node", "2", "-m", "sidestep_plugin", *line()]
    began = time.monotonic()
    code, out = run(words, FAIL="1:5")
    assert code == 1 and time.monotonic() - began < 90
    told = [text for text in out.splitlines() if text.startswith("Error")]
    assert len(told) == 1 and re.match("Error in process 1 of 2 on .*: .*made to fail", told[0]), out
    assert ("To resume from the newest checkpoint:" in out) == (launcher == "devices")
    assert all_gone(workers(place), seconds=15)


def test_a_process_that_is_killed_ends_the_training(line, place):
    code, out = run([*MODULE, *line("--devices", 2)], KILL="1:5")
    assert code == 1, out
    assert re.search(r"Error: process 1 of 2 \(pid \d+\) was killed \(SIGKILL\)", out), out
    assert len([text for text in out.splitlines() if text.startswith("Error")]) == 1, out
    assert all_gone(workers(place), seconds=15)
    code, out = run([*MODULE, *line("--devices", 2, "--resume-from", "latest")])
    assert code == 0, out
    assert run([*MODULE, *line("--devices", 2, output="whole")])[0] == 0
    assert equal(adapter(place / "output"), adapter(place / "whole"))


@pytest.mark.parametrize("launcher", ["devices", "torchrun"])
def test_a_launcher_that_is_killed_leaves_nothing_running(line, place, monkeypatch, launcher):
    monkeypatch.setenv("SLOW", "0.3")
    words = [*MODULE, *line("--devices", 2)]
    if launcher == "torchrun":
        words = [*TORCHRUN, "--nproc-per-node", "2", "-m", "sidestep_plugin", *line()]
    with running(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        pids = workers(place)
        process.kill()
        process.wait()
        assert all_gone(pids, seconds=60)
    assert (place / "output" / "interrupted" / "resume_state.pt").is_file(), "and what was learned is saved"
    monkeypatch.setenv("SLOW", "0")
    code, out = run([*MODULE, *line("--devices", 2, "--resume-from", "latest")])
    assert code == 0, out


@pytest.mark.parametrize("then, now", [(2, 1), (1, 2), (2, 3)])
def test_another_number_of_processes_says_what_changes(line, place, then, now):
    code, out = run([*MODULE, *line("--devices", then)], FAIL="0:8")
    assert code == 1, out
    code, out = run([*MODULE, *line("--devices", now, "--resume-from", "latest")])
    assert code == 0, out
    assert f"Note: changed since the checkpoint: processes (was {then}, now {now})" in out
    report = json.loads((place / "output" / "training_report.json").read_text(encoding="utf-8"))
    assert report["ending"] == "finished"


def test_unusable_input_is_told_once(line):
    code, out = run([*MODULE, *line("--devices", 2, "--model", "nothing")])
    assert code == 2 and out.count("No model 'nothing'") == 1, out


def test_songs_are_checked_by_the_first_process_alone(line, place, checkout):
    import shutil

    songs = shutil.copytree(checkout.tensors, place / "songs")
    song = torch.load(songs / "song_03.pt", weights_only=True)
    song["target_latents"][3, 3] = float("nan")
    torch.save(song, songs / "song_03.pt")
    code, out = run([*MODULE, *line("--devices", 2, "--dataset-dir", songs)])
    assert code == 2 and out.count("song_03.pt") == 1, out


def pair(line, first=(), second=()):
    """Two machines on one, with other arguments each | returns exit code and output of both."""
    several = ("--devices", 1, "--nodes", 2, "--rendezvous", f"127.0.0.1:{free_port()}")
    words = [*MODULE, *line(*several, "--node-rank", 1, *second)]
    with running(words, stderr=subprocess.STDOUT) as other:
        mine = run([*MODULE, *line(*several, "--node-rank", 0, *first)])
        out = other.communicate()[0]
    return mine, (other.returncode, out)


def test_two_machines_with_other_models(line, place):
    """One process would train its half of the steps as another variant, and the metadata would not say so."""
    for code, out in pair(line, second=("--model", "turbo")):
        assert code == 2 and "differs from process 0" in out and "in variant: turbo and not base" in out, out
        assert "Traceback" not in out
    assert not (place / "output").exists()


def test_a_machine_without_songs(line, place):
    (place / "none").mkdir()
    for code, out in pair(line, second=("--dataset-dir", place / "none")):
        assert code == 2 and "No songs in" in out and "Traceback" not in out, out


def test_ctrl_c_ends_the_waiting_for_another_machine(line, place):
    several = ("--devices", 1, "--nodes", 2, "--node-rank", 1, "--rendezvous", f"127.0.0.1:{free_port()}")
    with running([*MODULE, *line(*several)], stderr=subprocess.STDOUT) as process:
        next(text for text in process.stdout if "Waiting for process 0 (machine 0) at 127.0.0.1:" in text)
        process.send_signal(signal.SIGTERM)
        out = process.communicate()[0]
    assert process.returncode == 130 and out == "Interrupted before the training began; nothing was saved.\n"
