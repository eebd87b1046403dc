"""Shows a training as it goes: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import shutil
import sys
import time
from typing import TYPE_CHECKING

import click

from sidestep_plugin.hookspecs import hookimpl
from sidestep_plugin.text import counted

from .terminal import say, unread

if TYPE_CHECKING:
    from click._termui_impl import ProgressBar

    from sidestep_plugin.run import Step

_SMOOTHING = 0.1  # weight of the newest loss, as in upstream's own smoothed curve
_SECONDS_BETWEEN_LINES = 30.0
_BAR, _NARROW_BAR = 16, 6  # characters
_WIDE = 120  # columns of a terminal
_TIMED_STEPS = 10  # after which the rest is estimated
_WORTH_SAYING = 60.0  # seconds that are left


class Progress:
    """Counts training steps and shows epoch, step, smoothed loss, rate, elapsed time and time left. Itself a plugin.

    It reads only the loss that upstream has already fetched from the device.
    """

    def __init__(self) -> None:
        self.step = 0
        self.began = False
        self.loss: float | None = None
        self.newest = 0.0
        self.best_epoch: int | None = None
        self._steps_per_epoch = 1
        self._epochs = self._first_step = self._steps = 1
        self._bar: ProgressBar[int] | None = None
        self._began = self._first = self._shown = time.monotonic()

    def begin(self, steps_per_epoch: int, epochs: int, steps: int | None = None) -> None:
        """Start the display, now that the number of steps is known."""
        self._began = time.monotonic()
        self._steps_per_epoch, self._epochs = max(1, steps_per_epoch), epochs
        self._steps = self._steps_per_epoch * epochs if steps is None else steps
        if sys.stdout is not None and sys.stdout.isatty():
            self._bar = click.progressbar(
                length=self._steps,
                label="Training",
                show_pos=True,
                show_eta=False,  # click would count the steps of earlier runs as done by this one
                show_percent=False,
                item_show_func=lambda _: self._status(self._room()),
                width=_BAR if shutil.get_terminal_size().columns >= _WIDE else _NARROW_BAR,
                update_min_steps=1,
            )
            self._bar.render_progress()

    def say(self, text: str) -> None:
        """Print a line without tearing the bar."""
        with unread(sys.stdout):
            if self._bar is None:
                click.echo(text)
                return
            blank = " " * (shutil.get_terminal_size().columns - 1)
            click.echo(f"\r{blank}\r{text}")
            # click draws the bar only when its text changes.
            self._bar._last_line = None
            self._bar.render_progress()

    def end(self) -> None:
        """Leave the bar as it is, and print the total time below it."""
        if self._bar is not None:
            with unread(sys.stdout):
                self._bar.render_finish()
            self._bar = None
        if self.began:
            steps = self.step - self._first_step + 1
            say(f"Total time: {_duration(time.monotonic() - self._began)} for {counted(steps, 'training step')}")

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
            self._first = self._shown = time.monotonic()  # the setup does not count for the rate
        self.best_epoch = getattr(step.run, "best_epoch", None)
        self.step = step.run.steps  # of a resumed training with those before it
        if math.isfinite(self.newest):  # upstream skips single steps that are not finite
            before = self.newest if self.loss is None else self.loss
            self.loss = _SMOOTHING * self.newest + (1.0 - _SMOOTHING) * before
        with unread(sys.stdout):
            self._show()
        if self.step - self._first_step == _TIMED_STEPS and self.step < self._total:
            self._say_how_long()

    def _say_how_long(self) -> None:
        """Say once what an epoch takes, by the clock and without asking the device."""
        a_step = 1.0 / self._rate()
        epoch, rest = a_step * self._steps_per_epoch, a_step * (self._total - self.step)
        if rest < _WORTH_SAYING:
            return
        self.say(
            f"Time: about {_duration(epoch)} per epoch, {_duration(rest)} left ({_TIMED_STEPS} steps took "
            f"{_duration(_TIMED_STEPS * a_step)})"
        )

    def _show(self) -> None:
        if self._bar is not None:
            self._bar.update(self.step - self._bar.pos, self.step)
            return
        now = time.monotonic()
        if self.step % self._steps_per_epoch == 0 or now - self._shown >= _SECONDS_BETWEEN_LINES:
            self._shown = now
            click.echo(f"step {self.step}/{self._total}, {self._status()}")

    @property
    def _total(self) -> int:
        return self._steps

    def _room(self) -> int:
        """Characters beside the bar: a line that wraps could not be written over."""
        assert self._bar is not None
        clutter = len(f"Training  []  {self._total}/{self._total}  ") + self._bar.width
        return shutil.get_terminal_size().columns - 1 - clutter

    def _rate(self) -> float:
        """Steps per second that this run has computed; 0 until its second step."""
        done = self.step - self._first_step
        return done / max(time.monotonic() - self._first, 1e-9) if done > 0 else 0.0

    def _status(self, room: int | None = None) -> str:
        """Epoch, loss, rate and times; what does not fit into the room is left out, the rate first."""
        epoch = min(self._epochs, (max(self.step, 1) - 1) // self._steps_per_epoch + 1)
        loss = "-" if self.loss is None else f"{self.loss:.4f}"
        parts = {"epoch": f"epoch {epoch}/{self._epochs}", "loss": f"loss (smoothed) {loss}"}
        if self.best_epoch is not None:
            parts["best"] = f"best epoch {self.best_epoch}"
        if rate := self._rate():
            parts["rate"] = f"{rate:.2f} steps/s"
            parts["elapsed"] = f"{_duration(time.monotonic() - self._began)} elapsed"
            if self.step < self._total:
                parts["left"] = f"{_duration((self._total - self.step) / rate)} left"
        for name in ("rate", "elapsed", "left", "best"):
            if room is not None and len(", ".join(parts.values())) > room:
                parts.pop(name, None)
        return ", ".join(parts.values())


def _duration(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
