r"""The mathematics of timesteps. Pure: nothing here draws a random number or knows a model.

Convention (ACE-Step's): t = 1 is pure noise and t = 0 is data, ``x_t = t*noise + (1 - t)*data``. Most flow-matching
libraries use the opposite direction.

Sources: the inference warp and the 8-step tables are those of ACE-Step 1.5's ``generate_audio``; the logit-normal law
is that of its ``sample_t_r``, after Esser et al. 2024, "Scaling Rectified Flow Transformers", section 3.1.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

_STANDARD_NORMAL = NormalDist()

END: Final = 0.001
"""How near to 0 or 1 a timestep counts as being at that end."""
NARROWEST: Final = 0.01
"""Smallest range of t that the middle 90 % of a training law's timesteps may span."""


def shift_warp(t: float, shift: float) -> float:
    """Warp an inference time | given t in [0, 1] and shift > 0 | returns ``shift*t / (1 + (shift - 1)*t)`` in [0, 1].

    Raises:
        ValueError: t outside [0, 1], or shift not a positive finite number.
    """
    if not 0.0 <= t <= 1.0:
        raise ValueError(f"t must lie in [0, 1], got {t!r}")
    if not (math.isfinite(shift) and shift > 0.0):
        raise ValueError(f"shift must be a positive number, got {shift!r}")
    # The denominator is written as a sum of terms that are never negative, so the result is exactly 1 at t = 1 and
    # never above 1, for any shift.
    return shift * t / (shift * t + (1.0 - t))


def inference_timesteps(shift: float, steps: int) -> tuple[float, ...]:
    """Timesteps of a generation, noisiest first | given shift > 0 and steps >= 1 | returns `steps` floats in (0, 1].

    Even steps 1, (n-1)/n, ..., 1/n, each warped by :func:`shift_warp`. With 8 steps and shift 1, 2 or 3 these are the
    tables in the turbo model's own code.

    Raises:
        ValueError: shift not a positive finite number, or steps < 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps!r}")
    return tuple(shift_warp((steps - i) / steps, shift) for i in range(steps))


def logit_normal(z: torch.Tensor, mu: float, sigma: float) -> torch.Tensor:
    """Map standard normal draws to logit-normal ones | given z, any shape | returns ``sigmoid(z*sigma + mu)``.

    Same shape, dtype and device as z; values in (0, 1). The order of operations is that of the models' own
    ``sample_t_r``, so that equal draws give equal bits.
    """
    return (z * sigma + mu).sigmoid()


def max_of_two_logit_normal_cdf(t: float, mu: float, sigma: float) -> float:
    r"""Law of the training timestep of base and sft | given t | returns P(T <= t) in [0, 1].

    T is the maximum of two independent logit-normal(mu, sigma) draws, so
    ``P(T <= t) = Phi((logit(t) - mu) / sigma)**2`` (the maximum is at most t when both draws are).
    Its median at mu -0.4, sigma 1 is 0.536; that of a single draw would be 0.401.

    Raises:
        ValueError: sigma not positive.
    """
    if not sigma > 0.0:
        raise ValueError(f"sigma must be positive, got {sigma!r}")
    if t <= 0.0:
        return 0.0
    if t >= 1.0:
        return 1.0
    return _STANDARD_NORMAL.cdf((math.log(t / (1.0 - t)) - mu) / sigma) ** 2


def max_of_two_logit_normal_quantile(part: float, mu: float, sigma: float) -> float:
    """The inverse of :func:`max_of_two_logit_normal_cdf` | given part in (0, 1) | returns t in [0, 1]."""
    logit = mu + sigma * _STANDARD_NORMAL.inv_cdf(math.sqrt(part))
    return 0.5 * (1.0 + math.tanh(logit / 2.0))  # the sigmoid, without overflow


def why_no_training_law(mu: float, sigma: float) -> str:
    """Why a model cannot have been trained at these timesteps, "" when it can.

    A law is refused for what it draws. Both bounds are far from the official models' law (mu -0.4, sigma 1), which
    draws 0.1 % of t below 0.1, 0.9 % above 0.9, and the middle 90 % between 0.24 and 0.83:

    - more than half of all t lie within 0.001 of 0 or 1 (:data:`END`): nearly every step trains on the bare song, or on
      pure noise;
    - the middle 90 % of t span less than 0.01 (:data:`NARROWEST`): every step trains at the same t.

    Raises:
        ValueError: sigma not positive.
    """
    at_0 = max_of_two_logit_normal_cdf(END, mu, sigma)
    at_1 = 1.0 - max_of_two_logit_normal_cdf(1.0 - END, mu, sigma)
    if at_0 + at_1 > 0.5:
        place = "1" if at_0 < 0.01 else "0" if at_1 < 0.01 else "0 or 1"
        return f"{100 * (at_0 + at_1):.0f} % of its timesteps are within {END} of {place}"
    low, median, high = (max_of_two_logit_normal_quantile(part, mu, sigma) for part in (0.05, 0.5, 0.95))
    return f"its timesteps are all about {median:.3g}" if high - low < NARROWEST else ""
