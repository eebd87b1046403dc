"""Trains every song without its lyrics and caption: each condition becomes the model's null condition."""

from sidestep_plugin import hookimpl


@hookimpl
def acestep_prepare_batch(step, batch):
    conditions = batch["encoder_hidden_states"]
    null = step.run.model.null_condition_emb.detach().to(conditions.device, conditions.dtype)
    return {"encoder_hidden_states": null.expand_as(conditions)}
