"""Averages the adapter while it trains (``--average``), and touches nothing: the training is the same, bit for bit.

Behind each optimizer step the trained tensors are added to a running mean, which is saved as ``average/`` beside every
adapter and evaluated by whoever evaluates the adapter. A checkpoint keeps the mean, so that a resumed training has the
one that it would have had without the stop. In several processes each keeps its own: the weights are equal everywhere.

The mean is in fp32 on the device of the adapter: 4 bytes for each trained number, read and written once a step, which
the optimizer does with five times as much. On the CPU each step would have to wait for a copy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from ..errors import Refusal
from ..hookspecs import hookimpl
from ..options import option
from ..run import Run, Step
from .mean import POWER, RunningMean

if TYPE_CHECKING:
    import torch

_KEY: Final = "sidestep.averaging"
NAME: Final = "average"
"""Name of the variant: of the folder beside an adapter, and of what a checkpoint keeps."""


@hookimpl
def acestep_options() -> list[click.Option]:
    return [option("--average", "Also save the mean of the adapter over about the last third of its training.")]


@hookimpl
def engine_planned(run: Run) -> list[str] | None:
    """Begin a mean, or go on with the checkpoint's. Raises Refusal when that is damaged."""
    if not run.options["average"]:
        left = run.resuming and run.kept.get(NAME) is not None
        return ["Note: the checkpoint's average ends here: this run is without --average."] if left else None
    kept = run.kept.get(NAME)
    averaging = run.state[_KEY] = _Averaging(run, RunningMean() if kept is None else RunningMean.from_state(kept))
    run.variants[NAME] = averaging.tensors
    run.keeps[NAME] = averaging.as_state
    run.facts.append(averaging.facts)
    return ["Note: the average begins here: the checkpoint has none."] if run.resuming and kept is None else None


@hookimpl
def engine_training_began(run: Run) -> list[str] | None:
    averaging: _Averaging | None = run.state.get(_KEY)
    return None if averaging is None else [averaging.begin()]


@hookimpl
def acestep_step_finished(step: Step) -> None:
    averaging: _Averaging | None = step.run.state.get(_KEY)
    if averaging is not None and step.training:
        averaging.follow()


class _Averaging:
    """The average of one training."""

    def __init__(self, run: Run, mean: RunningMean) -> None:
        self._run, self._mean = run, mean
        self._seen: int | None = None  # the newest optimizer step that is in the mean, or that came before this run
        self._of: Mapping[str, Any] | None = None  # what a checkpoint kept that is held in the adapter's place
        self._held: RunningMean | None = None

    def begin(self) -> str:
        """Look at what is trained. Returns a line. Raises Refusal when the steps cannot be followed."""
        trained = self._run.engine.trained
        if not trained:
            raise Refusal(
                "This version of ACE-Step creates its optimizer in an unknown way, so nobody knows when it has made a "
                "step. Leave --average out, and average saved checkpoints: acestep-train average."
            )
        if self._mean.steps:
            self._mean.on(trained)
        size = sum(tensor.numel() for tensor in trained) * 4 / 2**20
        return (
            "Average: the mean of the adapter over about the last third of its training, saved as average/ beside "
            f"every adapter (does not change training; {size:.3g} MiB more memory)"
        )

    def follow(self) -> None:
        """Add the trained tensors if the optimizer has made a step since the last look."""
        engine = self._run.engine
        now = engine.optimizer_steps
        if self._seen is None:  # the first step that this run computes: nothing was trained since the checkpoint
            self._seen = now
        elif now != self._seen:
            self._seen = now
            self._mean.add(now, engine.trained)

    def tensors(self) -> Sequence[torch.Tensor] | None:
        """The mean as it is now; that of a checkpoint while this is held in the adapter's place; None: none yet."""
        return self._now().tensors or None

    def as_state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return self._now().as_state()

    def facts(self) -> dict[str, Any]:
        """About the average, where it is what is described."""
        if self._run.engine.variant != NAME:
            return {}
        mean = self._now()
        return {
            "average_of": f"the weights after optimizer steps {mean.first} to {mean.last}, step k counted as k^{POWER}",
            "average_steps": mean.steps,
        }

    def _now(self) -> RunningMean:
        held = self._run.engine.held
        if held is None:
            if self._seen is not None and self._run.engine.variant == "":
                self.follow()
            return self._mean
        kept = held.kept.get(NAME)
        if kept is None:
            return RunningMean()
        if self._held is None or self._of is not kept:
            self._held, self._of = RunningMean.from_state(kept), kept
        return self._held
