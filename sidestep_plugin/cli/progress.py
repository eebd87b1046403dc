"""Shows a training as it goes: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import shutil
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import click

from sidestep_plugin.hookspecs import hookimpl

if TYPE_CHECKING:
    from click._termui_impl import ProgressBar

    from sidestep_plugin.run import Step

_SMOOTHING = 0.1  # weight of the newest loss, as in upstream's own smoothed curve
_SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Counts training steps, and shows epoch, step, smoothed loss, rate and time left. Itself a plugin.

    Reads only the loss that upstream has fetched from the device anyway.
    """

    def __init__(self) -> None:
        self.step = 0
        self.began = False
        self.loss: float | None = None
        self.newest = 0.0
        self._steps_per_epoch = 1
        self._epochs = self._first_step = 1
        self._bar: ProgressBar[int] | None = None
        self._first = self._shown = time.monotonic()

    def begin(self, steps_per_epoch: int, epochs: int) -> None:
        """Start showing, now that it is known how much there is to do."""
        self._steps_per_epoch, self._epochs = max(1, steps_per_epoch), epochs
        if sys.stdout is not None and sys.stdout.isatty():
            self._bar = click.progressbar(
                length=self._steps_per_epoch * epochs,
                label="Training",
                show_pos=True,
                item_show_func=lambda _: self._status(),
                width=24,
                update_min_steps=1,
            )
            self._bar.render_progress()

    def say(self, text: str) -> None:
        """Print a line without tearing the bar."""
        # Nobody may be looking any more (a closed terminal, a pipe into head): the training goes on all the same.
        with suppress(OSError):
            if self._bar is None:
                click.echo(text)
                return
            blank = " " * (shutil.get_terminal_size().columns - 1)
            click.echo(f"\r{blank}\r{text}")
            # click draws the bar only when its text changes.
            self._bar._last_line = None
            self._bar.render_progress()

    def end(self) -> None:
        """Leave the bar as it stands and go on below it."""
        if self._bar is not None:
            self._bar.render_finish()
            self._bar = None

    @hookimpl
    def acestep_step_finished(self, step: Step) -> None:
        if not step.training:
            return
        assert step.loss is not None
        # Most versions of upstream have fetched the loss already; asking the device again would wait for it.
        recorded = getattr(step.module, "training_losses", None)
        self.newest = float(recorded[-1] if recorded else step.loss.detach())
        if not self.began:
            self.began, self._first_step = True, step.run.steps
            self._first = self._shown = time.monotonic()  # setting up is no part of the rate
        self.step = step.run.steps  # of a resumed training with those before it
        if math.isfinite(self.newest):  # upstream leaves single steps that are not finite out
            before = self.newest if self.loss is None else self.loss
            self.loss = _SMOOTHING * self.newest + (1.0 - _SMOOTHING) * before
        with suppress(OSError):
            self._show()

    def _show(self) -> None:
        if self._bar is not None:
            self._bar.update(self.step - self._bar.pos, self.step)
            return
        now = time.monotonic()
        if self.step % self._steps_per_epoch == 0 or now - self._shown >= _SECONDS_BETWEEN_LINES:
            self._shown = now
            total = self._steps_per_epoch * self._epochs
            left = f", {_duration((total - self.step) / self._rate())} left" if self._rate() else ""
            click.echo(f"step {self.step}/{total}, {self._status()}{left}")

    def _rate(self) -> float:
        """Steps a second since the first one; 0 as long as there is no second one."""
        done = self.step - self._first_step
        return done / max(time.monotonic() - self._first, 1e-9) if done > 0 else 0.0

    def _status(self) -> str:
        epoch = min(self._epochs, (max(self.step, 1) - 1) // self._steps_per_epoch + 1)
        loss = "-" if self.loss is None else f"{self.loss:.4f}"
        rate = f", {self._rate():.2f} steps/s" if self._rate() else ""
        return f"epoch {epoch}/{self._epochs}, loss {loss}{rate}"


def _duration(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
