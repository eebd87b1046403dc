"""Logs how many songs were seen, beside ACE-Step's own curves in TensorBoard."""

from sidestep_plugin import hookimpl


@hookimpl
def acestep_epoch_finished(run, epoch, loss):
    return {"songs seen": float(run.steps * run.training_config.batch_size)}
