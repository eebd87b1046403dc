"""Validation: songs that are held out are evaluated after the epochs, and plugins judge what was measured.

It is called from the engine, behind the last optimizer step of an epoch and before its checkpoint. Without Lightning
there is no such place; there it is called when the epoch's last batch has been computed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from ...errors import PluginError, Refusal
from ...run import Run, Validation, ValidationPlan, Verdict
from ..answers import checked_lines, described
from ..evaluation import evaluate, without_adapter
from ..loggers import log_entries
from .ending import save_best

if TYPE_CHECKING:
    from ...resuming.journal import Journal
    from ..current import Training
    from ..host import Host


class Validator:
    """The validation of one training.

    Args:
        host: the plugins.
        plan: what is measured.

    Attributes:
        training: the training, set before it begins.
        state: upstream's control of the training, with which it is stopped.
        behind_the_engine: whether the engine calls :meth:`after_epoch`, behind the optimizer's last step.
        stopped: whether a verdict has stopped the training.
    """

    def __init__(self, host: Host, plan: ValidationPlan) -> None:
        self.plan = plan
        self.training: Training | None = None
        self.state: dict[str, Any] | None = None
        self.behind_the_engine = self.stopped = False
        self._host = host
        self._baseline = plan.baseline

    def connect(self, journal: Journal) -> None:
        """Let the journal of the training say when it begins, and when the batches of an epoch have been computed."""
        finished = journal.epoch_finished

        def epoch_finished(run: Run, epoch: int, loss: float) -> None:
            if finished is not None:
                finished(run, epoch, loss)
            self.after_last_batch(run, epoch)

        journal.training_begins, journal.epoch_finished = self.before_training, epoch_finished

    def before_training(self, run: Run) -> None:
        """Evaluate the model without adapter, once, before the first step that this run computes."""
        if self._baseline:
            self._baseline = False
            self._measure(run, 0)

    def after_last_batch(self, run: Run, epoch: int) -> None:
        """Called for every epoch before the optimizer step of its last batches; validates without Lightning."""
        if not self.behind_the_engine:
            self.after_epoch(run, epoch)

    def after_epoch(self, run: Run, epoch: int) -> None:
        """Validate if it is time: every so many epochs, and after the last one. Raises Refusal."""
        journal = self._journal
        last = epoch == getattr(run.training_config, "max_epochs", None)
        if self.stopped or journal.catching_up or (epoch % self.plan.every and not last):
            return
        verdict = self._measure(run, epoch)
        if verdict.best:
            run.best_epoch = epoch
            for line in save_best(self._host, self._of_training):
                self._host.announce(line)
        if verdict.stop and not last and self.state is not None:
            self.stopped = True
            self.state["should_stop"] = True

    def _measure(self, run: Run, epoch: int) -> Verdict:
        host, plan, module = self._host, self.plan, self._of_training.trainer.module
        began = time.monotonic()
        try:
            with without_adapter(module) if epoch == 0 else nullcontext():
                losses = evaluate(module, plan.songs, plan.timesteps, plan.conditions)
            losses = run.gather(losses)[0]  # several processes judge the same numbers, also on GPUs of different kinds
            measured = Validation(epoch, losses, time.monotonic() - began)
            for plugin, verdict in host.registry.call("acestep_validated", run=run, validation=measured):
                return self._heard(plugin, verdict, epoch)
        except Refusal as refusal:  # upstream reports it as a failure
            host.refusal = refusal
            raise
        return Verdict()

    def _heard(self, plugin: str, verdict: Any, epoch: int) -> Verdict:
        if not isinstance(verdict, Verdict):
            raise PluginError(
                f"Plugin {plugin!r} returned {described(verdict)} from acestep_validated, expected a Verdict."
            )
        for line in checked_lines(plugin, "acestep_validated", verdict.lines):
            self._host.announce(line)
        if not isinstance(verdict.log, Mapping) or not all(
            isinstance(name, str) and isinstance(value, int | float) for name, value in verdict.log.items()
        ):
            raise PluginError(
                f"Plugin {plugin!r} returned a Verdict whose log is {described(verdict.log)} from acestep_validated, "
                "expected numbers by name."
            )
        log_entries(self._host, self._of_training.trainer, verdict.log, epoch)
        return verdict

    @property
    def _of_training(self) -> Training:
        assert self.training is not None
        return self.training

    @property
    def _journal(self) -> Journal:
        journal = self._of_training.journal
        assert journal is not None
        return journal


def planned(host: Host, run: Run, journal: Journal | None) -> Validator | None:
    """Ask the plugins for a plan and connect it with the journal | None without validation. Raises Refusal."""
    if journal is None:
        return None
    for plugin, plan in host.registry.call("acestep_plan_validation", run=run):
        if not isinstance(plan, ValidationPlan):
            raise PluginError(
                f"Plugin {plugin!r} returned {described(plan)} from acestep_plan_validation, expected a ValidationPlan."
            )
        for line in checked_lines(plugin, "acestep_plan_validation", plan.lines):
            host.announce(line)
        run.best_epoch = plan.best_epoch
        validator = Validator(host, plan)
        validator.connect(journal)
        return validator
    return None
