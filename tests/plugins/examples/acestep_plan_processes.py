"""Trains in as many processes as were started with torchrun, and says how the songs were divided."""

from sidestep_plugin import hookimpl
from sidestep_plugin.run import ProcessPlan


@hookimpl
def engine_plan_processes(ranks):
    def outcome(run, songs, steps):
        return [f"{songs} songs in {ranks.world_size} processes: {steps} steps an epoch"]

    return ProcessPlan(ranks.local_world_size, ranks.machines, outcome=outcome)
