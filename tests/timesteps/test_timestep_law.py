"""The timesteps that the sidestep plugin samples: their law, and the random numbers that they use up.

Distributions are tested at fixed seeds, and every such test is shown to reject what it is meant to reject.
"""

import dataclasses
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest
from sidestep_plugin.hooks.timesteps import acestep_sample_timesteps
from sidestep_plugin.hooks.treatment import acestep_run_started
from whole_plugin import resolved

from sidestep_plugin.run import Run, Step
from sidestep_plugin.timesteps.schedule import max_of_two_logit_normal_cdf
from sidestep_plugin.timesteps.treatment import PLUGIN, treatment_of

CPU = torch.device("cpu")
SETTINGS = [(-0.4, 1.0), (0.5, 0.6)]
SHIFT_1 = [1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
MANY = 20_000
ACCEPTED, REJECTED = 0.01, 1e-6


def a_step(name="acestep-v15-base", mu=-0.4, sigma=1.0, training=True, **options):
    model = torch.nn.Module()
    model.config = SimpleNamespace(_name_or_path=name, timestep_mu=mu, timestep_sigma=sigma)
    model.null_condition_emb = torch.nn.Parameter(torch.zeros(1, 1, 4))
    values = resolved(**options)
    run = Run("lora", None, None, values, None, weakref.ref(model))
    acestep_run_started(run)
    return Step(run, SimpleNamespace(model=model), training, CPU, torch.float32)


def sample(step, batch_size, dtype=torch.float32):
    return acestep_sample_timesteps(step=step, batch_size=batch_size, device=CPU, dtype=dtype)


def p_of_the_law(t, mu, sigma):
    """Kolmogorov–Smirnov: how well timesteps fit the maximum of two logit-normal draws."""
    return kstest(t.double().numpy(), np.vectorize(lambda x: max_of_two_logit_normal_cdf(x, mu, sigma))).pvalue


def p_of_uniform(t, values):
    """Chi-square: how well timesteps fit a uniform choice of these values. Every timestep must be one of them."""
    counts = torch.stack([(t == value).sum() for value in values])
    assert int(counts.sum()) == len(t)
    return chisquare(counts.numpy()).pvalue


# -- base and sft ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["acestep-v15-base", "acestep-v15-sft", "acestep-v15-xl-base", "acestep-v15-xl-sft"])
@pytest.mark.parametrize(("mu", "sigma"), SETTINGS)
def test_base_and_sft_follow_the_maximum_of_two_draws(name, mu, sigma):
    torch.manual_seed(11)
    assert p_of_the_law(sample(a_step(name, mu, sigma), MANY), mu, sigma) > ACCEPTED


def test_the_law_also_holds_over_many_small_batches():
    step = a_step()
    torch.manual_seed(12)
    assert p_of_the_law(torch.cat([sample(step, 5) for _ in range(MANY // 5)]), -0.4, 1.0) > ACCEPTED


def test_turbo_asked_for_continuous_timesteps_follows_the_same_law():
    torch.manual_seed(13)
    t = sample(a_step("acestep-v15-turbo", timestep_mode="continuous"), MANY)
    assert p_of_the_law(t, -0.4, 1.0) > ACCEPTED


@pytest.mark.parametrize(("mu", "sigma"), SETTINGS)
def test_the_test_of_the_law_rejects_a_single_draw(mu, sigma):
    torch.manual_seed(11)
    assert p_of_the_law(torch.sigmoid(torch.randn(MANY) * sigma + mu), mu, sigma) < REJECTED


@pytest.mark.parametrize(("mu", "sigma"), SETTINGS)
def test_the_test_of_the_law_rejects_another_mu_and_another_sigma(mu, sigma):
    torch.manual_seed(11)
    assert p_of_the_law(sample(a_step(mu=mu + 0.1, sigma=sigma), MANY), mu, sigma) < REJECTED
    assert p_of_the_law(sample(a_step(mu=mu, sigma=sigma * 1.1), MANY), mu, sigma) < REJECTED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("batch_size", range(1, 10))
def test_exactly_two_normal_draws_are_used_in_order(batch_size, dtype):
    mu, sigma = -0.4, 0.9
    step = a_step(mu=mu, sigma=sigma)
    torch.manual_seed(batch_size)
    first, second = torch.randn((batch_size,), dtype=dtype), torch.randn((batch_size,), dtype=dtype)
    expected = torch.maximum(torch.sigmoid(first * sigma + mu), torch.sigmoid(second * sigma + mu))
    state = torch.get_rng_state()

    torch.manual_seed(batch_size)
    t = sample(step, batch_size, dtype)
    assert (t.shape, t.dtype, t.device) == ((batch_size,), dtype, CPU)
    assert torch.equal(t, expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_validation_is_sampled_like_training():
    torch.manual_seed(3)
    training = sample(a_step(training=True), 8)
    torch.manual_seed(3)
    assert torch.equal(sample(a_step(training=False), 8), training)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_parameters_stay_between_data_and_noise(dtype):
    """Laws like these are refused before a training; the sampler itself does not rely on that."""

    def extreme(mu):
        step = a_step()
        step.run.state[PLUGIN] = dataclasses.replace(treatment_of(step.run), mu=mu, sigma=3.0)
        return sample(step, 1000, dtype)

    t = torch.cat([extreme(mu) for mu in (-20.0, 20.0)])
    assert ((t >= 0.0) & (t <= 1.0)).all()
    assert t.min() < 1e-3 and t.max() > 0.99


@pytest.mark.parametrize("option", [{"shift": 7.0}, {"num_inference_steps": 3}, {"cfg_ratio": 0.0}])
def test_no_other_option_changes_the_timesteps(option):
    torch.manual_seed(4)
    plain = sample(a_step(), 8)
    torch.manual_seed(4)
    assert torch.equal(sample(a_step(**option), 8), plain)


# -- turbo -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["turbo", "turbo-shift3", "turbo-continuous", "xl-turbo"])
@pytest.mark.parametrize("options", [{}, {"shift": 1.0, "num_inference_steps": 50}])
def test_turbo_is_left_to_upstream_without_a_random_number(name, options):
    step = a_step(f"acestep-v15-{name}", **options)
    state = torch.get_rng_state()
    assert sample(step, 4) is None
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_turbo_shift1_is_uniform_over_exactly_its_eight_values(dtype):
    torch.manual_seed(21)
    t = sample(a_step("acestep-v15-turbo-shift1"), MANY, dtype)
    assert (t.shape, t.dtype) == ((MANY,), dtype)
    assert sorted(set(t.tolist()), reverse=True) == SHIFT_1  # eighths are exact in bf16 too
    assert p_of_uniform(t, SHIFT_1) > ACCEPTED


def test_the_test_of_uniformity_rejects_a_value_that_comes_too_seldom():
    torch.manual_seed(21)
    chosen = torch.multinomial(torch.tensor([1.0] * 7 + [0.8]), MANY, replacement=True)
    assert p_of_uniform(torch.tensor(SHIFT_1)[chosen], SHIFT_1) < REJECTED


@pytest.mark.parametrize("batch_size", range(1, 10))
def test_turbo_shift1_uses_one_draw_of_integers(batch_size):
    step = a_step("acestep-v15-turbo-shift1")
    torch.manual_seed(batch_size)
    expected = torch.tensor(SHIFT_1)[torch.randint(0, 8, (batch_size,))]
    state = torch.get_rng_state()
    torch.manual_seed(batch_size)
    assert torch.equal(sample(step, batch_size), expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_schedule_becomes_a_tensor_once_a_run(monkeypatch):
    built, tensor = [], torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *args, **kwargs: built.append(args) or tensor(*args, **kwargs))
    step = a_step("acestep-v15-turbo-shift1")
    for _ in range(3):
        sample(step, 4)
    assert len(built) == 1
    sample(a_step("acestep-v15-turbo-shift1"), 4)
    assert len(built) == 2, "another run has its own"


def test_each_dtype_gets_its_own_schedule_tensor():
    step = a_step("acestep-v15-turbo-shift1")
    assert [sample(step, 2, dtype).dtype for dtype in (torch.float32, torch.bfloat16)] == [
        torch.float32,
        torch.bfloat16,
    ]


# -- several models in one process -----------------------------------------------------------------------------------


def test_each_run_is_sampled_by_its_own_model():
    base, turbo, other = a_step(), a_step("acestep-v15-turbo"), a_step(mu=3.0, sigma=0.1)
    torch.manual_seed(5)
    t = sample(base, 1000)
    assert sample(turbo, 1000) is None
    assert sample(other, 1000).mean() > 0.9 > t.mean()
