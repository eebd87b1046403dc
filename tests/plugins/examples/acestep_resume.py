"""Takes from a checkpoint its weights alone: epochs, optimizer and learning rate begin anew."""

from sidestep_plugin import hookimpl
from sidestep_plugin.resuming.checkpoints import read_checkpoint
from sidestep_plugin.run import ResumePoint


@hookimpl
def engine_resume(run, folder):
    point = read_checkpoint(folder).point
    return ResumePoint(epochs=0, steps=0, weights=point.weights, parameters=point.parameters)
