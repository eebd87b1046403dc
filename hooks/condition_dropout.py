"""Replaces the conditions of a part of the rows by the model's null condition, as base and sft were trained.

Without it the adapter never learns the unprompted half of classifier-free guidance. It happens before upstream's step
draws its noise, which is the order of random draws in the models' own ``forward()``: mask, noise, timesteps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sidestep_plugin import Refusal, hookimpl
from sidestep_plugin.run import ROWS_WITHOUT_CONDITION, Step
from sidestep_plugin.timesteps.treatment import treatment_of

if TYPE_CHECKING:
    import torch


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
    step.run.state.setdefault(ROWS_WITHOUT_CONDITION, []).append(dropped)
    if step.device.type == "cpu":  # on a GPU, asking which rows would wait for it
        return _replaced(step, conditions, null, dropped.tolist())
    return {"encoder_hidden_states": torch.where(dropped.view(-1, 1, 1), null, conditions)}


def _replaced(
    step: Step, conditions: torch.Tensor, null: torch.Tensor, dropped: list[bool]
) -> dict[str, torch.Tensor] | None:
    """The same as ``torch.where``, with as little copied as can be.

    Where rows are kept beside dropped ones, the kept rows have to be copied: the batch belongs to its caller.
    """
    if not any(dropped):
        return None
    if len(dropped) == 1:
        return {"encoder_hidden_states": _repeated(step, null, conditions.shape[1])}
    replaced = conditions.clone()
    for row, without in enumerate(dropped):
        if without:
            replaced[row] = null[0]
    return {"encoder_hidden_states": replaced}


def _repeated(step: Step, null: torch.Tensor, length: int) -> torch.Tensor:
    """The null condition [1,L,D] for a batch of one row; one copy is kept, for the longest so far."""
    key = "sidestep.repeated_null_condition"
    kept: torch.Tensor | None = step.run.state.get(key)
    # Made anew if somebody wrote to what was handed out.
    if kept is None or kept.shape[1] < length or kept.dtype != null.dtype or kept._version:
        kept = step.run.state[key] = null.repeat(1, length, 1)
    return kept.narrow(1, 0, length)


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
