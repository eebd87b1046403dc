"""Keeps the adapter with the lowest mean loss as ``checkpoints/best``, and says it."""

from sidestep_plugin import hookimpl
from sidestep_plugin.run import Verdict


@hookimpl
def engine_validated(run, validation):
    mean = float(validation.losses.mean())
    best = validation.epoch > 0 and mean < run.state.get("lowest", float("inf"))
    if best:
        run.state["lowest"] = mean
    return Verdict(best=best, lines=(f"Epoch {validation.epoch}: {mean:.4f}",), log={"validation/mean": mean})
