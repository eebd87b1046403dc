"""Says how a training ended, for whoever reads the log in the morning."""

from sidestep_plugin import hookimpl


@hookimpl
def acestep_run_ended(run, ending, folder):
    return [f"{folder.name}: {ending} after {run.steps} steps"]
