"""What is running now: the step, the training, a save. Context variables keep threads apart."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ..run import ProcessPlan

if TYPE_CHECKING:
    from ..resuming.journal import Journal
    from ..resuming.lock import OutputLock
    from ..run import Run, Step, ValidationPlan


class Validates(Protocol):
    """What a training's validation is to the wrappers that call it.

    Attributes:
        plan: what is measured.
        behind_the_engine: whether the engine calls :meth:`after_epoch`, behind the epoch's last optimizer step.
        stopped: whether it has stopped the training.
    """

    plan: ValidationPlan
    behind_the_engine: bool
    stopped: bool

    def after_epoch(self, run: Run, epoch: int) -> None:
        """Validate if it is time."""


@dataclass(frozen=True, eq=False)
class Training:
    """One call of upstream's ``train_from_preprocessed``.

    Attributes:
        run: what plugins see of it.
        trainer: upstream's LoRATrainer or LoKRTrainer.
        journal: its progress; None if no plugin needs it.
        validation: what evaluates songs that are held out; None without validation.
        plan: in how many processes it runs.
        at_end: called when the training is over, last one first, to undo what was done for it alone.
    """

    run: Run
    trainer: Any
    journal: Journal | None
    validation: Validates | None = None
    plan: ProcessPlan = ProcessPlan()  # noqa: RUF009 - immutable
    at_end: list[Callable[[], object]] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class CommandLine:
    """What the command line did before it called upstream's trainer.

    Attributes:
        lock: the lock of the output folder, which this training must not ask for again.
        latest: whether the checkpoint to resume from is the newest one, chosen for the user.
    """

    lock: OutputLock
    latest: bool


running_step: ContextVar[Step | None] = ContextVar("acestep_running_step", default=None)
running_training: ContextVar[Training | None] = ContextVar("acestep_running_training", default=None)
command_line: ContextVar[CommandLine | None] = ContextVar("acestep_command_line", default=None)
saving: ContextVar[bool] = ContextVar("acestep_saving", default=False)
