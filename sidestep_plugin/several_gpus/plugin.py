"""Trains on several GPUs, on one machine or several: one process for each GPU, each with its share of the songs.

Every process computes the gradients of its own songs, and each optimizer step uses the mean of all: two processes train
what one process trains with twice the gradient accumulation, bit for bit on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import click

from ..errors import Refusal
from ..hookspecs import hookimpl
from ..options import WholeNumber, option
from ..ranks import Ranks
from ..run import ProcessPlan, Run
from ..text import counted

_OWN: Final = frozenset({"devices", "nodes", "node_rank", "rendezvous"})
"""Options that say something about one machine; torchrun says it in another way."""


@hookimpl
def acestep_options() -> list[click.Option]:
    where = "Where the machines meet: a free port of machine 0. With --nodes."
    return [
        option("--devices", "GPUs on this machine; on a CPU, processes.  [default: 1]", WholeNumber(1, 1024), "N"),
        option("--nodes", "Machines.  [default: 1]", WholeNumber(1, 1024), "N"),
        option("--node-rank", "Number of this machine, from 0. With --nodes.", WholeNumber(0, 1023), "N"),
        option("--rendezvous", where, click.STRING, "HOST:PORT"),
    ]


@hookimpl
def engine_plan_processes(options: Mapping[str, Any], ranks: Ranks) -> ProcessPlan:
    if ranks.several:
        _check_started(options, ranks)
        return ProcessPlan(ranks.local_world_size, ranks.machines, own=_OWN, outcome=_outcome)
    machines, machine, where = options["nodes"] or 1, options["node_rank"], options["rendezvous"] or ""
    if machines == 1:
        if machine or where:
            raise Refusal("--node-rank and --rendezvous are for several machines. Leave them out, or add --nodes.")
        return ProcessPlan(options["devices"] or 1)
    host, _, port = where.rpartition(":")
    if machine is None or not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise Refusal(
            f"--nodes {machines} needs --node-rank (0 to {machines - 1}, another on each machine) and --rendezvous "
            "HOST:PORT (the same on all of them). Give both, or start with torchrun."
        )
    if machine >= machines:
        raise Refusal(
            f"--node-rank {machine}: with --nodes {machines} the machines are 0 to {machines - 1}. Choose one."
        )
    return ProcessPlan(options["devices"] or 1, machines, machine, where)


@hookimpl
def acestep_run_started(run: Run) -> None:
    if run.ranks.several:
        run.facts.append(lambda: {"processes": run.ranks.world_size})


def _check_started(options: Mapping[str, Any], ranks: Ranks) -> None:
    """Refuse options that contradict what torchrun has started. Raises Refusal."""
    for name, there in (("devices", ranks.local_world_size), ("nodes", ranks.machines)):
        if (said := options[name]) not in (None, there):
            raise Refusal(f"--{name} is {said}, but {there} were started. Leave --{name} out under torchrun.")


def _outcome(run: Run, songs: int, steps: int) -> list[str]:
    config, count = run.training_config, run.ranks.world_size
    where = f"{run.ranks.local_world_size} on each of {run.ranks.machines} machines, " if run.ranks.machines > 1 else ""
    batch = int(getattr(config, "batch_size", 1))
    accumulation = max(1, int(getattr(config, "gradient_accumulation_steps", 1)))
    alone = math.ceil(songs / batch)
    updates = math.ceil(steps / accumulation)
    lines = [
        f"Devices: {count} ({where}one process each); batch {batch} x accumulation {accumulation} x {count} devices = "
        f"{batch * accumulation * count} songs for each optimizer step",
        f"Steps: {steps} per epoch on each device, where one device takes {alone}; the schedule of the learning rate "
        f"has {counted(updates * int(getattr(config, 'max_epochs', 1)), 'optimizer step')} ({updates} per epoch)",
    ]
    if twice := -songs % count:
        lines.append(
            f"Note: {counted(songs, 'song')} cannot be divided by {count}, so each epoch trains {twice} of them twice "
            "(others each time)."
        )
    return lines
