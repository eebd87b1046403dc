"""The clock of a training: whatever shows a time of it asks this one, so that no two figures contradict each other."""

from __future__ import annotations

import math
import time


class Clock:
    """The time of one training, in seconds.

    It begins when ACE-Step's trainer is called, with the model loaded already, and ends when everything is saved. Of a
    training that is resumed it counts the time since then.

    Attributes:
        most_steps: training steps after which the training is finished, behind the next optimizer step; None for all.
        ends_at: when the training is stopped, by the monotonic clock; None for never.
    """

    def __init__(self) -> None:
        self.most_steps: int | None = None
        self.ends_at: float | None = None
        self._began = time.monotonic()
        self._first = self._newest = 0.0  # when these steps were over
        self._steps = 0
        self._paused = 0.0  # between those two
        self._ended: float | None = None

    def stepped(self, paused: float) -> None:
        """Note that a training step is over.

        Args:
            paused: seconds since the first step that were spent on something else than training.
        """
        self._newest = time.monotonic()
        self._first = self._first if self._steps else self._newest  # the setup does not count for the time per step
        self._steps += 1
        self._paused = paused

    def stop(self) -> None:
        """The training is over: from now on the time stands still."""
        self._ended = self._ended or time.monotonic()

    @property
    def seconds(self) -> float:
        """How long the training takes so far, or has taken."""
        return self._now - self._began

    @property
    def seconds_per_step(self) -> float | None:
        """What a step takes, without validations and previews; None before the second step."""
        if self._steps < 2:
            return None
        return max(0.0, self._newest - self._first - self._paused) / (self._steps - 1)

    @property
    def pace(self) -> float | None:
        """Seconds by step all in all, with everything that came between two steps; None before the second step."""
        return (self._now - self._first) / (self._steps - 1) if self._steps > 1 else None

    def left(self, steps: int) -> float | None:
        """How long the training still takes, until it is stopped at the latest.

        Args:
            steps: how many steps are left, :attr:`most_steps` counted.

        Returns:
            Seconds; None if that cannot be told yet.
        """
        return None if self.pace is None else min(self.pace * max(0, steps), self.until_the_limit)

    @property
    def until_the_limit(self) -> float:
        """Seconds until :attr:`ends_at`, infinite without."""
        return math.inf if self.ends_at is None else max(0.0, self.ends_at - self._now)

    @property
    def _now(self) -> float:
        return time.monotonic() if self._ended is None else self._ended


def last_step(most: int | None, steps_per_epoch: int, epochs: int, accumulation: int) -> int:
    """The training step that a training ends with.

    Args:
        most: the most training steps: it ends with the optimizer step behind them. None: with its last epoch.
        steps_per_epoch: training steps of an epoch.
        epochs: how many there are.
        accumulation: training steps that make one optimizer step; an epoch ends with one in any case.
    """
    whole = steps_per_epoch * epochs
    if most is None or not steps_per_epoch:
        return whole
    before, rest = divmod(most, steps_per_epoch)
    each = max(1, accumulation)
    return min(whole, before * steps_per_epoch + min(steps_per_epoch, math.ceil(rest / each) * each))
