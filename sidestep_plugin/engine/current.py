"""What is running now: the step, the training, a save. Context variables keep threads apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..run import ProcessPlan

if TYPE_CHECKING:
    from ..run import Run, Step
    from .journal import Journal

T = TypeVar("T")


@dataclass(eq=False)
class Training:
    """One call of upstream's ``train_from_preprocessed``."""

    run: Run  # what plugins see of it
    trainer: Any  # upstream's LoRATrainer or LoKRTrainer
    journal: Journal | None = None  # its progress; None if no plugin needs it
    state: MutableMapping[str, Any] | None = None  # upstream's, with which it is stopped; None where it has none
    # in how many processes it runs
    plan: ProcessPlan = ProcessPlan()  # noqa: RUF009 - immutable
    from_command_line: bool = False  # whether the program ends with it
    at_end: ExitStack = field(default_factory=ExitStack)  # undoes what was done for this training alone, at its end
    resumed_from: Path | None = None  # the checkpoint's folder; None for a training from the start
    ending: Callable[[], Sequence[str]] | None = None  # saves the adapter of a training that a plugin has ended
    limits: Mapping[str, float] = field(default_factory=dict)  # its options that ended it, and up to which value
    failure: str = ""  # why it failed, as upstream or the engine reports it; "" while it has not
    variant: str = ""  # which of ``run.variants`` is in the adapter's place now; "" for what is trained


@dataclass(frozen=True, eq=False)
class CommandLine:
    """What the command line decided before it called upstream's trainer; it holds the lock of the output folder."""

    latest: bool  # whether the checkpoint to resume from is the newest one, chosen for the user
    plan: ProcessPlan  # in how many processes to train
    held_out: tuple[Path, ...] = ()  # the songs that are not trained on


running_step: ContextVar[Step | None] = ContextVar("acestep_running_step", default=None)
running_training: ContextVar[Training | None] = ContextVar("acestep_running_training", default=None)
command_line: ContextVar[CommandLine | None] = ContextVar("acestep_command_line", default=None)
saving: ContextVar[bool] = ContextVar("acestep_saving", default=False)


@contextmanager
def during(variable: ContextVar[T], value: T) -> Iterator[None]:
    """A block in which a context variable has a value."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
