"""The plugin sidestep as a training calls it: all its parts, in their order, for tests that make a run by hand."""

from __future__ import annotations

from sidestep_plugin.registry import Registry
from sidestep_plugin.run import Run, Step

PLUGIN = Registry.load(["sidestep"])


def resolved(**options):
    """Values of all options, with defaults."""
    return PLUGIN.resolve_options(options)


def prepared(step: Step, batch):
    """The entries of a batch that are replaced for a step; None when none is."""
    replaced = {}
    for _, answer in ((name, caller(step=step, batch={**batch, **replaced})) for name, caller in _callers()):
        for entries in answer or []:
            replaced |= entries
    return replaced or None


def _callers():
    return PLUGIN.callers("acestep_prepare_batch")


def finished(step: Step) -> None:
    PLUGIN.call("acestep_step_finished", step=step)


def started(run: Run) -> Run:
    """Let the corrections decide about a run."""
    from sidestep_plugin.hooks.treatment import acestep_run_started

    acestep_run_started(run)
    return run
