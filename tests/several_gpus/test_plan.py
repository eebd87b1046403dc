"""``--devices`` and its relatives, in one process: what is planned, announced, refused, and that 1 changes nothing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sidestep_plugin import PluginError, Refusal, hookimpl
from sidestep_plugin.engine import processes
from sidestep_plugin.engine.processes import lost_connection, plan_of
from sidestep_plugin.ranks import Ranks, ranks
from sidestep_plugin.registry import Registry

VARIABLES = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.fixture
def registry():
    return Registry.load(["sidestep"])


@pytest.fixture
def planned(registry, monkeypatch):
    """Plan with options, as a process that was started alone or with these ranks."""

    def plan(started=None, **options):
        if started is not None:
            monkeypatch.setenv("WORLD_SIZE", str(started.world_size))
            for name in VARIABLES:
                monkeypatch.setenv(name, str(getattr(started, name.lower())))
        return plan_of(registry, registry.resolve_options(options))

    return plan


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_one_device_is_upstream_bit_for_bit(train, equal_bits, kind):
    assert equal_bits(train("turbo", kind, plugins=None), train("turbo", kind, options={"devices": 1}))


def test_what_is_asked_for_is_planned(planned):
    assert planned().processes == planned(devices=1).processes == planned(nodes=1).processes == 1
    assert planned(devices=4).processes == 4
    plan = planned(devices=2, nodes=3, node_rank=1, rendezvous="host0:29500")
    assert (plan.processes, plan.machine, plan.rendezvous) == (6, 1, "host0:29500")


@pytest.mark.parametrize(
    "options, told",
    [
        ({"nodes": 2}, "needs --node-rank"),
        ({"nodes": 2, "node_rank": 0}, "needs --node-rank"),
        ({"nodes": 2, "node_rank": 0, "rendezvous": "host0"}, "HOST:PORT"),
        ({"nodes": 2, "node_rank": 0, "rendezvous": "host0:0"}, "HOST:PORT"),
        ({"nodes": 2, "node_rank": 2, "rendezvous": "host0:29500"}, "the machines are 0 to 1"),
        ({"node_rank": 1}, "add --nodes"),
        ({"rendezvous": "host0:29500"}, "add --nodes"),
    ],
)
def test_what_is_missing_is_said(planned, options, told):
    with pytest.raises(Refusal, match=told):
        planned(**options)


def test_what_torchrun_started_is_taken(planned):
    assert planned(Ranks(3, 4, 1, 2)).processes == 4
    with pytest.raises(Refusal, match="--devices is 4, but 2 were started"):
        planned(devices=4)
    with pytest.raises(Refusal, match="--nodes is 4, but 2 were started"):
        planned(nodes=4)


@pytest.mark.parametrize(
    "changed, told",
    [
        ({"RANK": ""}, "RANK is not set"),
        ({"RANK": "first"}, "RANK is first"),
        ({"RANK": "4"}, "does not fit together"),
        ({"LOCAL_RANK": "2"}, "does not fit together"),
        ({"LOCAL_WORLD_SIZE": "3"}, "does not fit together"),
    ],
)
def test_ranks_that_contradict_each_other(monkeypatch, changed, told):
    for name, value in zip(("WORLD_SIZE", *VARIABLES), "4312", strict=True):
        monkeypatch.setenv(name, value)
    assert ranks() == Ranks(3, 4, 1, 2) and ranks().machines == 2
    for name, value in changed.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Refusal, match=told):
        ranks()


def test_several_without_a_plugin_are_refused(monkeypatch):
    for name, value in zip(("WORLD_SIZE", *VARIABLES), "2002", strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(Refusal, match="Use --plugin sidestep"):
        plan_of(Registry.load([]), {})


@pytest.mark.parametrize("missing", ["Fabric", "LIGHTNING_AVAILABLE"])
def test_several_without_lightning_are_refused(trainer, train, monkeypatch, missing):
    for name, value in zip(("WORLD_SIZE", *VARIABLES), "2002", strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(trainer, missing, False)
    (message,) = train("base").messages
    assert "needs Lightning Fabric" in message


def test_several_where_only_one_was_started_are_refused(train):
    (message,) = train("base", options={"devices": 2}).messages
    assert "2 processes were asked for, but this one was started alone" in message


def test_a_plan_is_a_plan():
    class Planner:
        @hookimpl
        def engine_plan_processes(self):
            return 2

    registry = Registry.load([])
    registry.register(Planner(), "planner")
    with pytest.raises(PluginError, match="returned an int from engine_plan_processes, expected a ProcessPlan"):
        plan_of(registry, {})


def test_songs_that_cannot_be_divided_are_announced(planned):
    plan = planned(Ranks(0, 3, 0, 3))
    config = SimpleNamespace(batch_size=1, gradient_accumulation_steps=2, max_epochs=10)
    run = SimpleNamespace(training_config=config, ranks=ranks())
    devices, steps, note = plan.outcome(run, 7, 3)
    assert "3 devices = 6 songs" in devices and "3 per epoch on each device, where one device takes 7" in steps
    assert "20 optimizer steps (2 per epoch)" in steps and "2 of them are trained twice" in note
    assert len(plan.outcome(run, 9, 3)) == 2


@pytest.mark.parametrize(
    "text, lost",
    [("[..gloo/transport/tcp/pair.cc:553] Connection closed by peer", True), ("CUDA out of memory", False)],
)
def test_a_lost_connection_is_told_from_a_failure(text, lost):
    assert lost_connection(text) == lost


def test_a_signal_that_comes_while_they_agree_waits_for_the_next_step(monkeypatch):
    """Else this process would stop alone, and the others would wait for it."""
    import torch.distributed

    own, said = {}, []
    monkeypatch.setitem(processes._groups, "cpu", None)
    monkeypatch.setattr(
        torch.distributed, "all_reduce", lambda *_, **__: own.update(should_stop=True, interrupted=True)
    )
    shared = processes.SharedState(own, said.append)
    assert not shared.get("should_stop", False) and not shared.agreed and not said
    assert shared.get("should_stop", False) and shared.agreed and len(said) == 1
