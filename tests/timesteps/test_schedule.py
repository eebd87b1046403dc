"""The mathematics of timesteps: the shift warp, the 8-step tables and the law of base and sft."""

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from scipy.special import logit
from scipy.stats import norm

from sidestep_plugin.timesteps.schedule import (
    inference_timesteps,
    logit_normal,
    max_of_two_logit_normal_cdf,
    max_of_two_logit_normal_quantile,
    shift_warp,
)

TABLES = {
    1.0: (1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125),
    2.0: (1.0, 0.933, 0.857, 0.769, 0.667, 0.545, 0.4, 0.222),
    3.0: (1.0, 0.955, 0.9, 0.833, 0.75, 0.643, 0.5, 0.3),
}
SHIFTS = [0.1, 0.2, 0.3, 0.5, 1.0, 1.7, 2.0, 3.0, 5.0, 10.0]
EVEN = [i / 16 for i in range(17)]


# -- inference schedule ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", TABLES)
def test_eight_steps_are_the_published_tables(shift):
    assert tuple(round(t, 3) for t in inference_timesteps(shift, 8)) == TABLES[shift]


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_eight_steps_are_exactly_the_warped_eighths(shift):
    exact = [Fraction(shift) * t / (1 + (shift - 1) * t) for t in (Fraction(8 - i, 8) for i in range(8))]
    assert inference_timesteps(float(shift), 8) == pytest.approx([float(t) for t in exact], rel=1e-15)


def test_shift_three_holds_these_fractions():
    fractions = [(1, 1), (21, 22), (9, 10), (5, 6), (3, 4), (9, 14), (1, 2), (3, 10)]
    assert inference_timesteps(3.0, 8) == pytest.approx([a / b for a, b in fractions], rel=1e-15)


@pytest.mark.parametrize("steps", [1, 2, 8, 50])
@pytest.mark.parametrize("shift", SHIFTS)
def test_a_schedule_starts_at_noise_and_falls_but_never_reaches_data(shift, steps):
    schedule = inference_timesteps(shift, steps)
    assert len(schedule) == steps
    assert schedule[0] == pytest.approx(1.0, rel=1e-12)
    assert all(later < earlier for earlier, later in pairwise(schedule))
    assert schedule[-1] > 0.0


@pytest.mark.parametrize("steps", [0, -1])
def test_a_schedule_needs_a_step(steps):
    with pytest.raises(ValueError, match=f"at least 1, got {steps}"):
        inference_timesteps(1.0, steps)


# -- shift warp ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", SHIFTS)
def test_the_warp_keeps_data_and_noise_where_they_are(shift):
    assert shift_warp(0.0, shift) == 0.0
    assert shift_warp(1.0, shift) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("shift", [*SHIFTS, 1e-5, 1e-9, 1e5])
def test_the_warp_stays_between_data_and_noise(shift):
    assert all(0.0 <= shift_warp(t, shift) <= 1.0 for t in EVEN)


@pytest.mark.parametrize("t", EVEN)
def test_shift_one_changes_nothing(t):
    assert shift_warp(t, 1.0) == t


@pytest.mark.parametrize("shift", SHIFTS)
def test_the_warp_is_strictly_monotone(shift):
    warped = [shift_warp(t, shift) for t in EVEN]
    assert all(low < high for low, high in pairwise(warped))


@pytest.mark.parametrize("t", EVEN[1:-1])
def test_a_greater_shift_spends_more_steps_near_noise(t):
    assert shift_warp(t, 0.5) < t < shift_warp(t, 2.0) < shift_warp(t, 3.0)


@pytest.mark.parametrize("shift", SHIFTS)
def test_the_reciprocal_shift_is_the_inverse(shift):
    assert [shift_warp(shift_warp(t, shift), 1.0 / shift) for t in EVEN] == pytest.approx(EVEN, rel=1e-12)


@pytest.mark.parametrize("t", [-0.001, 1.001, float("nan"), float("inf")])
def test_the_warp_refuses_a_time_outside_the_unit_interval(t):
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1\]"):
        shift_warp(t, 3.0)


@pytest.mark.parametrize("shift", [0.0, -1.0, float("nan"), float("inf"), float("-inf")])
def test_the_warp_refuses_a_shift_that_is_not_positive_and_finite(shift):
    with pytest.raises(ValueError, match=r"shift must be a positive number"):
        shift_warp(0.5, shift)
    with pytest.raises(ValueError, match=r"shift must be a positive number"):
        inference_timesteps(shift, 8)


# -- law of base and sft ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("mu", "sigma"), [(-0.4, 1.0), (0.3, 0.7)])
def test_logit_normal_is_the_written_out_formula_bit_for_bit(dtype, mu, sigma):
    z = torch.randn(513, generator=torch.Generator().manual_seed(1)).to(dtype)
    before = z.clone()
    t = logit_normal(z, mu, sigma)
    assert t.dtype == dtype
    assert torch.equal(t, torch.sigmoid(torch.add(torch.mul(z, sigma), mu)))
    assert torch.equal(z, before)


def test_the_law_has_the_median_and_the_tails_of_the_maximum_of_two_draws():
    def cdf(t):
        return max_of_two_logit_normal_cdf(t, -0.4, 1.0)

    assert cdf(0.536) == pytest.approx(0.5, abs=2e-3)
    assert cdf(0.24) == pytest.approx(0.05, abs=5e-3)
    assert cdf(0.83) == pytest.approx(0.95, abs=5e-3)
    assert cdf(0.401) < 0.26, "0.401 is the median of a single draw"


@pytest.mark.parametrize(("mu", "sigma"), [(-0.4, 1.0), (0.0, 0.5), (1.2, 2.0)])
@pytest.mark.parametrize("t", [1e-9, 0.01, 0.25, 0.5, 0.9, 1 - 1e-9])
def test_the_law_is_the_square_of_the_normal_law_of_the_logit(t, mu, sigma):
    expected = norm.cdf((logit(t) - mu) / sigma) ** 2
    assert max_of_two_logit_normal_cdf(t, mu, sigma) == pytest.approx(expected, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("t", [0.05, 0.2, 0.5, 0.536, 0.8, 0.95])
def test_the_law_rises_everywhere_with_the_density_of_a_maximum(t):
    h, mu, sigma = 1e-5, -0.4, 1.0
    slope = (max_of_two_logit_normal_cdf(t + h, mu, sigma) - max_of_two_logit_normal_cdf(t - h, mu, sigma)) / (2 * h)
    z = (logit(t) - mu) / sigma
    assert slope > 0.0
    assert slope == pytest.approx(2 * norm.cdf(z) * norm.pdf(z) / (sigma * t * (1 - t)), rel=1e-5)


@pytest.mark.parametrize(("t", "probability"), [(-1.0, 0.0), (0.0, 0.0), (1.0, 1.0), (2.0, 1.0)])
def test_the_law_is_nothing_up_to_data_and_everything_from_noise(t, probability):
    assert max_of_two_logit_normal_cdf(t, -0.4, 1.0) == probability


@pytest.mark.parametrize(("mu", "sigma"), [(-0.4, 1.0), (1.5, 0.3), (0.0, 4.0)])
@pytest.mark.parametrize("part", [0.01, 0.05, 0.5, 0.95, 0.99])
def test_the_quantile_is_the_inverse_of_the_law(part, mu, sigma):
    t = max_of_two_logit_normal_quantile(part, mu, sigma)
    assert max_of_two_logit_normal_cdf(t, mu, sigma) == pytest.approx(part, abs=1e-9)


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan")])
def test_the_law_refuses_a_sigma_that_is_not_positive(sigma):
    with pytest.raises(ValueError, match=r"sigma must be positive"):
        max_of_two_logit_normal_cdf(0.5, -0.4, sigma)
