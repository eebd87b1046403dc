"""Stops a training whose loss has become NaN or infinite: more hours would not bring it back.

Upstream skips single steps whose gradients are not finite and goes on. This reads the losses that upstream has already
fetched from the device; in versions that keep none, it does nothing.
"""

from __future__ import annotations

import math
from typing import Final

from ..errors import Refusal
from ..hookspecs import hookimpl
from ..run import Step

IN_A_ROW: Final = 20
"""Steps in a row without a finite loss after which the training is stopped."""

_KEY: Final = "sidestep.steps_without_a_finite_loss"


@hookimpl
def acestep_step_finished(step: Step) -> None:
    losses = getattr(step.module, "training_losses", None)
    if not step.training or not losses:
        return
    state = step.run.state
    state[_KEY] = 0 if math.isfinite(losses[-1]) else state.get(_KEY, 0) + 1
    if state[_KEY] >= IN_A_ROW:
        rate = getattr(step.run.training_config, "learning_rate", None)
        raise Refusal(
            f"The loss has not been a finite number for {IN_A_ROW} steps (up to step {step.run.steps}), so the "
            f"training was stopped. Lower --learning-rate (now {rate}) and resume from an earlier checkpoint, or "
            "preprocess the songs again."
        )
