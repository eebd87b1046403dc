"""Remembers how noisy each step was. It keeps tensors: turning them into numbers in every step would wait for a GPU."""

from sidestep_plugin import hookimpl


@hookimpl
def acestep_step_finished(step):
    if step.training:
        step.run.state.setdefault("timesteps", []).append(step.t)
