"""The page of a training while it goes on: what is on it, when it is written, and that writing it ends no training."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ..clock import last_step
from ..run import NEXT_COMMANDS, Run
from ..text import sentence
from .page import FILE_NAME, SCHEMA_VERSION, now, write_page

SHARE: Final = 0.05
"""Of the time, that writing the page may take while it trains."""


class LivePage:
    """The page of one training. Its methods raise nothing: what goes wrong is told once.

    Args:
        run: the training.
        report: returns the entries of ``training_report.json`` as they are now; takes how the training has ended.

    Attributes:
        written: whether there is a page of this training.
    """

    def __init__(self, run: Run, report: Callable[[str], Mapping[str, Any]]) -> None:
        self._run, self._report = run, report
        self._began = False  # before the first step that this run computes
        self._epochs_before: int | None = None
        self._epoch = 0
        self._ending: str | None = None
        self._next = 0.0  # when the page may be written again
        self._told = False
        self.written = False
        self._songs: list[str] = []

    def begin(self) -> list[str]:
        """Write the first page, in place of that of an earlier training. Returns lines for the user."""
        run = self._run
        self._began = True
        self._epoch = self._epochs_before = run.engine.epochs_before
        self._songs = [song.stem for song in run.engine.songs]
        written = self._write("training")
        return [f"Page: {run.engine.folder / FILE_NAME} (open it in a browser; it follows the training)"] * written

    def epoch_over(self, epoch: int) -> None:
        """Write the page anew, unless that would take too much of the time."""
        self._epoch = epoch
        if self._began and time.monotonic() >= self._next:
            self._write("training")

    def ended(self, ending: str) -> None:
        """Note how the training has ended: "finished", "stopped" or "failed"."""
        self._ending = ending

    def close(self) -> None:
        """Write the last page. The training is over, however it ended."""
        if not self._began and self._ending is None:  # refused: the page of an earlier training stays true
            return
        done = self._run.engine.epochs_done
        if done is not None and self._ending is not None:
            self._epoch = max(self._epoch, done)
        failed = self._run.engine.failure and self._ending != "stopped"
        self._write("failed" if failed else self._ending or "stopped")

    def _write(self, state: str) -> bool:
        """Write the page. Returns whether it was written."""
        since, run = time.monotonic(), self._run
        try:
            write_page(run.engine.folder, self._data(state))
        except Exception as error:  # a training of hours matters more than a page
            if not self._told:
                self._told = True
                reason = getattr(error, "strerror", None) or error
                run.engine.announce(
                    f"Warning: {FILE_NAME}, the page of this training, could not be written: {sentence(reason)} The "
                    "training goes on."
                )
            return False
        finally:
            took = time.monotonic() - since
            self._next = since + took / SHARE
        self.written = True
        return True

    def _data(self, state: str) -> dict[str, Any]:
        run, engine = self._run, self._run.engine
        report = dict(self._report(state))
        done, before = max(run.steps, engine.steps_before), engine.steps_before  # its loop goes through those anew
        report["training_steps"] = done
        clock, config, (_, length) = run.clock, run.training_config, engine.place_in_epoch
        epochs, steps = getattr(config, "max_epochs", None), None
        if length and isinstance(epochs, int):
            each = int(getattr(config, "gradient_accumulation_steps", 1))
            steps = last_step(clock.most_steps, length, epochs, each)
        commands: Callable[[str], Sequence[tuple[str, str]]] | None = run.state.get(NEXT_COMMANDS)
        saved = engine.interrupted
        return {
            "schema_version": SCHEMA_VERSION,
            "state": state,
            "reason": engine.failure if state == "failed" else "",
            "written": now(),
            "seconds": round(clock.seconds, 3),
            "seconds_per_epoch": clock.pace * length if clock.pace is not None and length else None,
            "seconds_left": None if steps is None else clock.left(steps - done),
            "limit": _limit(run, steps),
            "epochs_done": self._epoch,
            "epochs": epochs,
            "steps": steps,
            "resumed_after": (self._epochs_before or 0) if run.resuming else None,
            "resumed_step": before if run.resuming and length and before % length else None,
            "facts": dict(run.describe()),
            "report": report,
            "songs": self._songs,
            "held_out": [song.stem for song in run.held_out],
            "told": [line for line in engine.told if line.strip()],
            "memory": _memory(run),
            "folder": str(engine.folder),
            "final": str(_final(engine.folder)),
            "saved": str(saved) if saved is not None and state in ("stopped", "failed") else None,
            "commands": [list(pair) for pair in commands(state)] if commands is not None else [],
        }


def _final(output: Path) -> Path:
    """Where programs find the finished adapter: ACE-Step saves a LoRA in a folder of its own below `final`."""
    inner = output / "final" / "adapter"
    return inner if inner.is_dir() else inner.parent


def _limit(run: Run, steps: int | None) -> str:
    """The option that ends the training before its last epoch, as it is going now; "" for none."""
    clock, (_, length) = run.clock, run.engine.place_in_epoch
    if steps is None or not length:
        return ""
    left = clock.left(steps - run.steps)
    if left is not None and left >= clock.until_the_limit:
        return f"--time-limit {run.options['time_limit']}"
    return f"--max-steps {clock.most_steps}" if steps < length * run.training_config.max_epochs else ""


def _memory(run: Run) -> dict[str, Any] | None:
    """The most memory of the GPU that was in use, in bytes; None without a CUDA GPU. The counter is only read."""
    import torch

    parameter = next(iter(run.engine.decoder.parameters()), None)
    if parameter is None or parameter.device.type != "cuda":
        return None
    device = parameter.device
    return {
        "peak": torch.cuda.max_memory_allocated(device),
        "total": torch.cuda.get_device_properties(device).total_memory,
        "name": torch.cuda.get_device_name(device),
    }
