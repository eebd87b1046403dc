"""What is said of the validations of a training, from planted losses."""

from __future__ import annotations

import math

import pytest
import torch

from sidestep_plugin.validation.history import History, Validation

TIMESTEPS = (0.2, 0.4, 0.6, 0.8)


@pytest.fixture
def history():
    return History(["a.pt"], [""], False, TIMESTEPS, 0.15, (True, False), 1, None)


def judged(history, epoch, by_t, without=(2.0,) * 4):
    losses = torch.tensor([list(zip(by_t, without, strict=True))], dtype=torch.float64)
    return history.judge(Validation(epoch, losses, 0.0))


def notes(verdict):
    return [line for line in verdict.lines if line.startswith(("Note: ", "Warning: "))]


def test_low_and_high_t_part_ways(history):
    """Said once, when it begins, and again only after they came together."""
    judged(history, 0, (1.0, 1.0, 1.0, 1.0))
    assert not notes(judged(history, 1, (0.9, 0.9, 0.8, 0.8)))
    (note,) = notes(judged(history, 2, (0.8, 0.8, 0.9, 0.9)))
    assert note == (
        "Note: the loss at high t is +12.50 % above its lowest (epoch 1), while that at low t still falls, which is "
        "often the first sign of overfitting"
    )
    assert not notes(judged(history, 3, (0.7, 0.7, 0.95, 0.95)))
    assert not notes(judged(history, 4, (0.6, 0.6, 0.7, 0.7)))
    (note,) = notes(judged(history, 5, (0.65, 0.65, 0.6, 0.6)))
    assert note == "Note: the loss at low t is +8.33 % above its lowest (epoch 4), while that at high t still falls"


def test_both_halves_getting_worse_is_no_parting(history):
    judged(history, 0, (1.0,) * 4)
    judged(history, 1, (0.8,) * 4)
    assert not notes(judged(history, 2, (0.9,) * 4))


def test_what_tensorboard_gets(history):
    judged(history, 0, (1.0,) * 4)
    logged = judged(history, 1, (0.9, 1.1, 0.5, 0.5), without=(2.2,) * 4).log
    assert logged["validation/loss"] == pytest.approx(0.85 * 0.75 + 0.15 * 2.2)
    assert logged["validation/share of t improved"] == 0.75
    assert logged["validation/change at t 0.20"] == pytest.approx(-0.1)
    assert logged["validation/change at t 0.40"] == pytest.approx(0.1)
    assert logged["validation/change at t 0.80 without condition"] == pytest.approx(0.1)
    assert len(logged) == 3 + 2 * len(TIMESTEPS)


def test_a_loss_that_is_not_finite_is_warned_of_once_and_never_the_best(history):
    judged(history, 0, (1.0,) * 4)
    assert judged(history, 1, (0.9,) * 4).best
    verdict = judged(history, 2, (math.nan, 0.1, 0.1, 0.1))
    assert not verdict.best and len(notes(verdict)) == 1 and all(map(math.isfinite, verdict.log.values()))
    assert not notes(judged(history, 3, (math.inf, 0.1, 0.1, 0.1))) and history.best == 1
    assert judged(history, 4, (0.8,) * 4).best
