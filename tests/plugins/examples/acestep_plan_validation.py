"""Validates on the songs of a folder "validation" beside the dataset, at three timesteps, every second epoch."""

from sidestep_plugin import hookimpl
from sidestep_plugin.run import ValidationPlan


@hookimpl
def engine_plan_validation(run):
    songs = sorted(run.tensor_dir.with_name("validation").glob("*.pt"))
    return ValidationPlan(tuple(songs), timesteps=(0.25, 0.5, 0.75), every=2) if songs else None
