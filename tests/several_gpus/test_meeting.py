"""How processes find each other and compare what they train, without training: threads stand for the processes."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from several_gpus.processes import free_port

from sidestep_plugin import Refusal
from sidestep_plugin.engine import meeting, processes, sameness
from sidestep_plugin.engine.processes import LostProcess, SaidElsewhere, check_agreement, in_all
from sidestep_plugin.ranks import Ranks
from sidestep_plugin.registry import Registry

ABOUT = {"torch": "2.9.0", "device": "cpu"}
TWO = (Ranks(0, 2, 0, 1), Ranks(1, 2, 0, 1))
"""Two machines with one process each."""


@pytest.fixture
def address(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setattr(meeting, "_SILENT", 0.3)


def met(*processes, seconds=60.0, later=0.0):
    """Let processes meet, each with what it says of itself | returns what came of it and what each said."""
    came, said = [None] * len(processes), [[] for _ in processes]

    def meet(place, here, about):
        try:
            came[place] = meeting.meet(here, about, said[place].append)
        except BaseException as error:
            came[place] = error

    threads = [
        threading.Thread(target=meet, args=(place, *process), daemon=True) for place, process in enumerate(processes)
    ]
    for thread in threads:
        thread.start()
        time.sleep(later)
    for thread in threads:
        thread.join(seconds)
    assert not any(thread.is_alive() for thread in threads), said
    return came, said


def test_two_that_fit_meet(address):
    (first, second), _ = met(*((here, ABOUT) for here in TWO))
    first.set("a", "b")
    assert second.get("a") == b"b"


def test_whoever_is_missing_is_named(address):
    (first, _), (said, _) = met(*((here, ABOUT) for here in TWO), later=1.0)
    assert not isinstance(first, BaseException)
    assert said and said[0].startswith("Waiting for process 1 (machine 1) at 127.0.0.1:") and "Ctrl-C" in said[0]


def test_the_other_machines_say_it_too(address, capsys):
    later, earlier = ((here, ABOUT) for here in TWO)
    (_, first), _ = met(earlier, later, later=1.0)
    assert not isinstance(first, BaseException)
    assert capsys.readouterr().err.startswith("Waiting for process 0 (machine 0) at 127.0.0.1:")


@pytest.mark.parametrize("here, named", [(TWO[0], "Process 1 (machine 1)"), (TWO[1], "Process 0 (machine 0)")])
def test_somebody_who_does_not_come_is_not_waited_for_for_ever(address, monkeypatch, here, named):
    monkeypatch.setattr(meeting, "_LONGEST", 1.0)
    (refusal,), _ = met((here, ABOUT))
    assert isinstance(refusal, Refusal) and str(refusal).startswith(f"{named} did not come to 127.0.0.1:")


@pytest.mark.parametrize(
    "changed, told",
    [
        ({"torch": "2.8.0"}, "torch is 2.8.0, and 2.9.0 in process 0"),
        ({"device": "cuda"}, "device is cuda, and cpu in process 0"),
    ],
)
def test_two_that_do_not_understand_each_other(address, changed, told):
    came, _ = met((TWO[0], ABOUT), (TWO[1], ABOUT | changed))
    assert all(isinstance(refusal, Refusal) and told in str(refusal) for refusal in came)


def test_another_number_of_machines(address):
    came, _ = met((TWO[0], ABOUT), (Ranks(2, 3, 0, 1), ABOUT))
    assert all("processes is 3, and 2 in process 0" in str(refusal) for refusal in came)


def test_two_machines_of_one_number(address):
    came, _ = met((Ranks(0, 3, 0, 1), ABOUT), *((Ranks(1, 3, 0, 1), ABOUT),) * 2)
    assert all("Two processes are number 1" in str(refusal) and "--node-rank" in str(refusal) for refusal in came)


def test_two_machines_numbered_0(address):
    """Also where the second one is started after the first."""
    with socket.create_server(("127.0.0.1", int(os.environ["MASTER_PORT"]))):
        (refusal,), _ = met((TWO[0], ABOUT))
    assert isinstance(refusal, Refusal) and "another machine that is numbered 0" in str(refusal)


def test_a_port_that_another_program_uses(address):
    with socket.create_server(("127.0.0.1", int(os.environ["MASTER_PORT"]))):
        (refusal,), _ = met((Ranks(0, 2, 0, 2), ABOUT))
    assert isinstance(refusal, Refusal) and "cannot be used" in str(refusal) and "Traceback" not in str(refusal)


@pytest.mark.parametrize("here", TWO)
def test_a_machine_that_nobody_knows(address, monkeypatch, here):
    monkeypatch.setenv("MASTER_ADDR", "no-such-machine.invalid")
    monkeypatch.setattr(meeting, "_KNOWN", 0.3)
    (refusal,), _ = met((here, ABOUT))
    assert isinstance(refusal, Refusal)
    assert "No machine no-such-machine.invalid is known here" in str(refusal) and "--rendezvous" in str(refusal)


def test_machine_0_on_another_machine_than_the_address(address, monkeypatch):
    monkeypatch.setattr(meeting, "_answers", lambda host, port: False)
    (refusal,), _ = met((TWO[0], ABOUT))
    assert isinstance(refusal, Refusal) and "--node-rank 0 on the machine that --rendezvous names" in str(refusal)


@pytest.mark.parametrize("text", ["", "many", "0", "65536"])
def test_a_port_that_is_none(address, monkeypatch, text):
    monkeypatch.setenv("MASTER_PORT", text)
    with pytest.raises(Refusal, match="MASTER_PORT is"):
        meeting.meet(TWO[0], ABOUT, print)


# -- what they train -------------------------------------------------------------------------------------------------


@pytest.fixture
def among(monkeypatch):
    """This process among those of a training: ``among(here, what process 0 says, what process 1 says)``."""

    def place(here, *said):
        monkeypatch.setenv("WORLD_SIZE", str(here.world_size))
        for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            monkeypatch.setenv(name, str(getattr(here, name.lower())))
        monkeypatch.setattr(processes, "gather", lambda _: [(value, f"host{n}") for n, value in enumerate(said)])

    return place


def differing(monkeypatch, *said):
    monkeypatch.setattr(processes, "gather", lambda _: [(f"host{rank}", value) for rank, value in enumerate(said)])
    with pytest.raises(Refusal) as refusal:
        check_agreement(said[0])
    return str(refusal.value)


def test_another_model_is_named(checkout, monkeypatch):
    base, turbo = (sameness.of_the_model(checkout.checkpoints / f"acestep-v15-{name}") for name in ("base", "turbo"))
    told = differing(monkeypatch, base, turbo)
    assert told.startswith("Process 1 on host1 differs from process 0 on host0 in variant: turbo and not base. Give")


def test_a_model_is_the_same_wherever_it_lies(checkout, tmp_path):
    there = checkout.checkpoints / "acestep-v15-base"
    here = shutil.copytree(there, tmp_path / "acestep-v15-base")
    for file in here.glob("*.py"):
        file.write_bytes(file.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
    assert sameness.of_the_model(here) == sameness.of_the_model(there)


def test_other_weights_of_the_same_shapes_are_named(checkout, tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    there = checkout.checkpoints / "acestep-v15-base"
    here = shutil.copytree(there, tmp_path / "acestep-v15-base")
    (file,) = here.glob("*.safetensors")
    save_file({name: weight + 0.01 for name, weight in load_file(file).items()}, file, metadata={"format": "pt"})
    assert file.stat().st_size == (there / file.name).stat().st_size
    told = differing(monkeypatch, sameness.of_the_model(there), sameness.of_the_model(here))
    assert f"in weights of the model: other contents in {file.name}." in told


def of_the_training(module=None, songs=None):
    return sameness.of_the_training(module, Registry(), {}, frozenset(), "lora", None, None, songs)


def test_other_songs_of_the_same_names_and_sizes_are_named(checkout, tmp_path, monkeypatch):
    songs = shutil.copytree(checkout.tensors, tmp_path / "songs")
    song = torch.load(songs / "song_02.pt", weights_only=True)
    song["target_latents"] = song["target_latents"].flip(0)
    torch.save(song, songs / "song_02.pt")
    assert (songs / "song_02.pt").stat().st_size == (checkout.tensors / "song_02.pt").stat().st_size
    told = differing(monkeypatch, of_the_training(songs=checkout.tensors), of_the_training(songs=songs))
    assert "in songs: other contents in song_02.pt. Give" in told
    (songs / "song_02.pt").rename(songs / "song_99.pt")
    (songs / "manifest.json").unlink(missing_ok=True)
    told = differing(monkeypatch, of_the_training(songs=checkout.tensors), of_the_training(songs=songs))
    assert "in songs: it lacks song_02.pt; it also has song_99.pt. Give" in told


def test_another_version_of_the_trainer_is_named(trainer, monkeypatch, tmp_path):
    (tmp_path / "trainer.py").write_text("# a fork\n", encoding="utf-8")
    fork = of_the_training(SimpleNamespace(__file__=str(tmp_path / "trainer.py")))
    assert "in version of ACE-Step: " in differing(monkeypatch, of_the_training(trainer), fork)


def test_a_refusal_in_one_process_ends_all(among):
    """The first process of each machine tells why."""

    def refuses():
        raise Refusal("No songs in /songs.")

    among(TWO[1], None, "No songs in /songs.")
    with pytest.raises(Refusal, match=r"^No songs in /songs\.$"):
        in_all(refuses)
    among(TWO[0], None, "No songs in /songs.")
    with pytest.raises(Refusal, match=r"^Process 1 on host1: No songs in /songs\.$"):
        in_all(lambda: "songs")
    among(Ranks(1, 4, 1, 2), None, None, "No songs in /songs.", None)
    with pytest.raises(SaidElsewhere):
        in_all(lambda: "songs")
    among(TWO[0], None, None)
    assert in_all(lambda: "songs") == "songs"


def test_a_process_that_is_gone_is_a_refusal_and_no_traceback():
    def gone():
        raise RuntimeError("[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:41234\nmore")

    with pytest.raises(LostProcess, match=r"lost \(.*Connection closed by peer.*\)\. See what it says") as lost:
        processes._hearing_signals(gone)
    assert processes.lost_connection(str(lost.value))


def test_waiting_for_torch_hears_a_signal():
    import signal

    if not hasattr(signal, "setitimer"):
        pytest.skip("needs POSIX timers")

    def raises(*_):
        raise KeyboardInterrupt

    over = threading.Event()
    before = signal.signal(signal.SIGALRM, raises)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            processes._hearing_signals(lambda: over.wait(60.0))
    finally:
        signal.signal(signal.SIGALRM, before)
        over.set()
