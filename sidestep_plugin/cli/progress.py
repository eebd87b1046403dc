"""Shows a training as it goes: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import shutil
import sys
import time
from typing import TYPE_CHECKING

import click

from sidestep_plugin.clock import Clock
from sidestep_plugin.hookspecs import hookimpl
from sidestep_plugin.text import counted, hours

from .terminal import for_people, say, unread

if TYPE_CHECKING:
    from click._termui_impl import ProgressBar

    from sidestep_plugin.run import Run, Step

_SMOOTHING = 0.1  # weight of the newest loss, as in upstream's own smoothed curve
_SECONDS_BETWEEN_LINES = 30.0
_BAR, _NARROW_BAR = 14, 6  # characters that the bar has at least; it takes what the words leave
_WIDE, _NOT_NARROW = 120, 100  # columns of a terminal
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
        self.rate: float | None = None
        self.memory = 0
        self._run: Run | None = None
        self._steps_per_epoch = 1
        self._epochs = self._first_step = self._steps = 1
        self._bar: ProgressBar[int] | None = None
        self._clock = Clock()  # the training's own from its first step on
        self._shown = self._looked = time.monotonic()
        self._waiting = False

    def begin(self, steps_per_epoch: int, epochs: int, steps: int | None = None) -> None:
        """Start the display, now that the number of steps is known."""
        self._steps_per_epoch, self._epochs = max(1, steps_per_epoch), epochs
        self._steps = self._steps_per_epoch * epochs if steps is None else steps
        if sys.stdout is not None and sys.stdout.isatty():
            self._bar = click.progressbar(
                length=self._steps,
                label=_label(),
                bar_template="%(label)s[%(bar)s]  %(info)s",
                show_pos=True,
                show_eta=False,  # click would count the steps of earlier runs as done by this one
                show_percent=False,
                item_show_func=lambda _: self._status(self._room()),
                width=_least(),
                update_min_steps=1,
            )
            self._draw()

    def say(self, text: str) -> None:
        """Print a line without tearing the bar."""
        with unread(sys.stdout):
            if self._bar is None:
                click.echo(for_people(text, sys.stdout))
                return
            click.echo(f"\r{_blank()}\r{for_people(text, sys.stdout)}")
            self._draw()

    def end(self) -> None:
        """Leave the bar as it is in the end, and print the total time below it."""
        self._clock.stop()
        if self._bar is not None:
            with unread(sys.stdout):
                self._draw()
                self._bar.render_finish()
            self._bar = None
        if self.began:
            steps = self.step - self._first_step + 1
            say(f"Total time: {hours(self._clock.seconds)} for {counted(steps, 'training step')}")

    @property
    def computes(self) -> bool:
        """Whether the first step that is not replayed has begun: there may be something to save."""
        return self._run is not None and self._run.steps > self._run.resumed_at

    @hookimpl
    def acestep_run_started(self, run: Run) -> None:
        self._run = run

    @hookimpl
    def engine_waiting(self, run: Run, what: str, done: int, total: int) -> None:
        """Show on a terminal what the training waits for, in place of the bar."""
        if self._bar is None or not total:
            return
        with unread(sys.stdout):
            self._waiting = done < total
            if not self._waiting:
                click.echo(f"\r{_blank()}\r", nl=False)
                self._draw()
                return
            counts = f"  {done}/{total}"
            room = _line() - len(f"{what}  []{counts}")
            filled = round(room * done / total)
            click.echo(f"\r{what}  [{'#' * filled}{'-' * (room - filled)}]{counts}", nl=False)

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
            self._clock, self._shown = step.run.clock, time.monotonic()
        self.best_epoch = getattr(step.run, "best_epoch", None)
        self._look(step)
        self.step = step.run.steps  # of a resumed training with those before it
        if math.isfinite(self.newest):  # upstream skips single steps that are not finite
            before = self.newest if self.loss is None else self.loss
            self.loss = _SMOOTHING * self.newest + (1.0 - _SMOOTHING) * before
        with unread(sys.stdout):
            self._show()
        if self.step - self._first_step == _TIMED_STEPS and self.step < self._steps:
            self._say_how_long()

    def _say_how_long(self) -> None:
        """Say once what an epoch takes, by the clock and without asking the device."""
        pace, rest = self._clock.pace, self._clock.left(self._steps - self.step)  # what it waits for is not known yet
        if pace is None or rest is None or rest < _WORTH_SAYING:
            return
        self.say(
            f"Time: about {hours(pace * self._steps_per_epoch)} per epoch, {hours(rest)} left ({_TIMED_STEPS} "
            f"steps took {hours(_TIMED_STEPS * pace)})"
        )

    def _show(self) -> None:
        if self._bar is not None:
            self._fit()
            self._bar.update(self.step - self._bar.pos, self.step)
            return
        now = time.monotonic()
        if self.step % self._steps_per_epoch == 0 or now - self._shown >= _SECONDS_BETWEEN_LINES:
            self._shown = now
            click.echo(f"step {self.step}/{self._steps}, {self._status()}")

    def _look(self, step: Step) -> None:
        """Read the learning rate and the memory of the GPU, once a second and without waiting for it."""
        now, engine = time.monotonic(), getattr(step.run, "engine", None)
        if self._bar is None or engine is None or (self.rate is not None and now - self._looked < 1.0):
            return
        self._looked, self.rate = now, engine.learning_rate
        if step.device.type == "cuda":
            import torch

            self.memory = torch.cuda.max_memory_allocated(step.device)

    def _fit(self) -> None:
        """Let the bar take the room that the words leave."""
        if self._bar is not None:
            self._bar.width = _least()
            self._bar.width += max(0, self._room() - len(self._status(self._room())))

    def _draw(self) -> None:
        """Draw the bar, also where its text is the same: click would leave it out."""
        if self._bar is not None and not self._waiting:
            self._fit()
            self._bar._last_line = None
            self._bar.render_progress()

    def _room(self) -> int:
        """Characters beside the bar: a line that wraps could not be written over."""
        assert self._bar is not None
        clutter = len(f"{_label()}[]  {self._steps}/{self._steps}  ") + self._bar.width
        return _line() - clutter

    def _status(self, room: int | None = None) -> str:
        """Epoch, loss, rate and times; what does not fit into the room is left out, the rate first."""
        epoch = min(self._epochs, (max(self.step, 1) - 1) // self._steps_per_epoch + 1)
        loss = "-" if self.loss is None else f"{self.loss:.4f}"
        parts = {"epoch": f"epoch {epoch}/{self._epochs}", "loss": f"loss (smoothed) {loss}"}
        if self.rate is not None:
            parts["lr"] = f"lr {self.rate:.1e}"
        if self._run is not None and self._run.best_epoch is not None:
            self.best_epoch = self._run.best_epoch  # perhaps of a validation after the newest step
        if self.best_epoch is not None:
            parts["best"] = f"best epoch {self.best_epoch}"
        if self.memory:
            parts["memory"] = f"GPU {self.memory / 2**30:.1f} GiB"
        if (a_step := self._clock.seconds_per_step) is not None:
            parts["rate"] = f"{1 / max(a_step, 1e-9):.2f} steps/s"
            parts["elapsed"] = f"{hours(self._clock.seconds)} elapsed"
            left = self._clock.left(self._steps - self.step)
            if self.step < self._steps and left is not None:
                parts["left"] = f"{hours(left)} left"
        for name in ("lr", "rate", "elapsed", "memory", "left", "best"):
            if room is not None and len(", ".join(parts.values())) > room:
                parts.pop(name, None)
        return ", ".join(parts.values())


def _least() -> int:
    """Characters that the bar has at least."""
    return _BAR if shutil.get_terminal_size().columns >= _WIDE else _NARROW_BAR


def _line() -> int:
    """Columns for a line that is drawn over: behind it there is room for the ^C that a terminal shows, and one more."""
    return shutil.get_terminal_size().columns - 3


def _label() -> str:
    """What stands before the bar, where there is room for it."""
    return "Training  " if shutil.get_terminal_size().columns >= _NOT_NARROW else ""


def _blank() -> str:
    return " " * (shutil.get_terminal_size().columns - 1)
