"""Ends a training early because somebody said how long it may take: ``--max-steps`` and ``--time-limit``."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Any, Final

import click

from ..errors import Refusal
from ..hookspecs import hookimpl
from ..options import WholeNumber, option
from ..run import Run, Step
from ..text import counted, hours

_KEY: Final = "limits"
_UNITS: Final = (86_400, 3600, 60, 1)  # seconds of a day, an hour, a minute, a second
_TIME: Final = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


class TimeSpan(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic from click 8.4 on
    """A length of time such as 8h, 90m or 1h30m | converts to that text."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value).strip().lower()
        if not text or _TIME.fullmatch(text) is None or not 0 < seconds_of(text) <= 10**9:
            self.fail(f"{value!r} is not a length of time. Expected one such as 8h, 90m or 1h30m.", param, ctx)
        return text


def seconds_of(text: str) -> int:
    """Seconds in a length of time such as 1h30m."""
    found = _TIME.fullmatch(text)
    numbers = found.groups("0") if found else "0000"
    return sum(int(number) * unit for number, unit in zip(numbers, _UNITS, strict=True))


@hookimpl
def acestep_options() -> list[click.Option]:
    return [
        option("--max-steps", "Finish after N training steps.", WholeNumber(1, 10**9), "N"),
        option("--time-limit", "Stop and save after this time: 8h, 90m, 1h30m.", TimeSpan(), "TIME"),
    ]


@hookimpl
def acestep_run_started(run: Run) -> list[str] | None:
    limits = _Limits(run)
    run.state[_KEY] = limits
    run.clock.most_steps, run.clock.ends_at = limits.steps, limits.ends_at
    if limits.ends_at is None:
        return None
    left = max(0, round(limits.ends_at - time.monotonic()))
    return [f"Time limit: {run.options['time_limit']}, then it stops and is saved; {hours(left)} left"]


@hookimpl
def engine_planned(run: Run) -> None:
    """Refuse a limit that the checkpoint to resume from has reached."""
    limits: _Limits = run.state[_KEY]
    done = run.kept.get(_KEY)
    before = done.get("steps", 0) if isinstance(done, dict) else 0
    if limits.steps is not None and before >= limits.steps:
        raise Refusal(
            f"The checkpoint was saved after {counted(before, 'training step')}, and --max-steps is {limits.steps}. "
            "Choose more, or leave it out."
        )
    run.keeps[_KEY] = lambda: {"steps": run.steps}


@hookimpl
def acestep_step_finished(step: Step) -> None:
    if step.training and step.run.state.get(_KEY) is not None:
        step.run.state[_KEY].look()


class _Limits:
    """The limits of one training."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.steps: int | None = run.options["max_steps"]
        limit: str | None = run.options["time_limit"]
        # When the time is over, by the monotonic clock.
        self.ends_at = None if limit is None else time.monotonic() + seconds_of(limit) - _already_running(run)
        self._over = False

    def look(self) -> None:
        """End the training if a limit is reached, once."""
        run = self._run
        if self._over:
            return
        if self.steps is not None and run.steps >= self.steps and self._may_end():
            self._over = True
            run.engine.finish(self._finish, {"max_steps": self.steps})
        # Of several processes one looks at its clock; all of them stop after the same step.
        elif self.ends_at is not None and run.ranks.first and time.monotonic() >= self.ends_at:
            self._over = True
            run.engine.stop(f"The time limit of {run.options['time_limit']} is reached: stopping after this step.")

    def _may_end(self) -> bool:
        """Whether the optimizer makes a step after this training step, so that no gradient is lost."""
        in_epoch, length = self._run.engine.place_in_epoch
        if length and self._run.steps >= length * int(getattr(self._run.training_config, "max_epochs", 0)):
            return False  # it ends by itself
        each = max(1, int(getattr(self._run.training_config, "gradient_accumulation_steps", 1)))
        return bool(in_epoch % each == 0 or in_epoch == length)

    def _finish(self) -> Sequence[str]:
        """Save the finished adapter. Returns lines."""
        run = self._run
        run.engine.save_weights("final")
        where = run.engine.folder / "final"
        return [f"✅ Training complete after {counted(run.steps, 'training step')} (--max-steps). Saved to {where}"]


def _already_running(run: Run) -> float:
    """Seconds for which the program runs already, if it is here for this training alone: schedulers count them."""
    if not run.engine.ends_the_program:
        return 0.0
    import psutil

    return max(0.0, time.time() - float(psutil.Process().create_time()))
