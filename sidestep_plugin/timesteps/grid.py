"""The timesteps at which an adapter is validated: always the same, and spread as the training's own. Pure."""

from __future__ import annotations

from typing import Final

from .schedule import max_of_two_logit_normal_quantile
from .treatment import Treatment

POINTS: Final = 8
"""Timesteps per song; turbo has as many inference steps."""


def validation_grid(treatment: Treatment) -> tuple[float, ...]:
    """The timesteps at which a model is validated, lowest first | values in (0, 1].

    Discrete: its training schedule, which is turbo's 8 inference steps. Continuous: the middles of 8 parts of the
    training law that are equally likely, so that a mean over them is an estimate of the training loss (stratified
    sampling with one point per stratum).
    """
    if treatment.mu is None or treatment.sigma is None:
        return tuple(sorted(treatment.schedule))
    parts = ((number + 0.5) / POINTS for number in range(POINTS))
    return tuple(max_of_two_logit_normal_quantile(part, treatment.mu, treatment.sigma) for part in parts)
