"""Replaces the conditions of a part of the rows by the model's null condition, as base and sft were trained.

Without it the adapter never learns the unprompted half of classifier-free guidance. It happens before upstream's step
draws its noise, which is the order of random draws in the models' own ``forward()``: mask, noise, timesteps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from sidestep_plugin import Refusal, hookimpl
from sidestep_plugin.run import Step

from .model_treatment import treatment_of

if TYPE_CHECKING:
    import torch


DROPPED: Final = "sidestep.dropped"
"""Where a run keeps which rows were dropped, a tensor a step, until the epoch is summed up."""


@hookimpl
def acestep_prepare_batch(step: Step, batch: Mapping[str, Any]) -> Mapping[str, torch.Tensor] | None:
    cfg_ratio = treatment_of(step.run).cfg_ratio
    if cfg_ratio == 0.0 or not step.training:
        return None
    import torch

    # In the compute dtype before anything is compared or replaced: the model's forward() draws and mixes in it.
    conditions = batch["encoder_hidden_states"].to(step.device, dtype=step.dtype, non_blocking=True)
    null = _null_condition(step)
    if null.shape[-1] != conditions.shape[-1]:
        raise Refusal(
            f"The songs' conditions are {conditions.shape[-1]} wide, the model's null condition {null.shape[-1]}: they "
            "were preprocessed with another model. Preprocess them again with this one."
        )
    dropped = torch.rand((conditions.shape[0],), device=step.device, dtype=step.dtype) < cfg_ratio
    step.run.state.setdefault(DROPPED, []).append(dropped)
    if step.device.type == "cpu" and not dropped.any():
        return None  # nothing to copy; on a GPU, asking would wait for it
    return {"encoder_hidden_states": torch.where(dropped.view(-1, 1, 1), null, conditions)}


def _null_condition(step: Step) -> torch.Tensor:
    """The model's null condition [1,1,D] where the step computes.

    The app may keep the whole model offloaded, so a copy is made once a run when one is needed; it is never trained.
    """
    state = step.run.state
    key = ("sidestep.null_condition", step.device, step.dtype)
    if key not in state:
        state[key] = step.run.model.null_condition_emb.detach().to(step.device, dtype=step.dtype)
    null: torch.Tensor = state[key]
    return null
