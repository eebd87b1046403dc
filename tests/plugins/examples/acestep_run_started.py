"""Refuses a run that would overtrain, and says what it saw otherwise."""

from sidestep_plugin import Refusal, hookimpl


@hookimpl
def acestep_run_started(run):
    epochs = run.training_config.max_epochs
    if epochs > 1000:
        raise Refusal(f"{epochs} epochs are more than these songs bear. Expected 1000 at most: --epochs 1000.")
    return [f"{run.adapter_type} of rank {run.adapter_config.r}, {epochs} epochs"]
