"""What is recorded while a run goes, so that a checkpoint says exactly where it was: position, losses, random states.

How a resumed run gets back to that position is in :mod:`.replay`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..adapters.kinds import BY_NAME
from ..run import ResumePoint, Run
from .random_states import random_states
from .replay import Replay, trained_tensors

if TYPE_CHECKING:
    import torch

_SKIPPED: Final[dict[str, Any]] = {}
"""Stands for a batch that is not read because its step is replayed."""

_TOGETHER: Final = 4096  # losses that are kept one by one before they become one tensor


class Losses:
    """A long list of losses that stay on their device: reading them one by one would wait for the GPU each time."""

    def __init__(self) -> None:
        self._parts: list[torch.Tensor] = []
        self._newest: list[torch.Tensor] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def append(self, loss: torch.Tensor) -> None:
        self._newest.append(loss.reshape(()))
        self._count += 1
        if len(self._newest) == _TOGETHER:
            self._join()

    def replace_newest(self, losses: torch.Tensor) -> None:
        """Put other losses, shape [N], in place of the newest N."""
        import torch

        self._parts = [torch.cat([self.all()[: -len(losses)], losses.cpu()])]

    def mean_of_newest(self, count: int) -> float:
        """Mean of the newest losses. Waits for the GPU."""
        import torch

        if count <= len(self._newest):
            return float(torch.stack([loss.float() for loss in self._newest[-count:]]).mean())
        return float(self.all()[-count:].float().mean())

    def all(self) -> torch.Tensor:
        """All losses, on the CPU."""
        import torch

        self._join()
        return torch.cat([part.cpu() for part in self._parts]) if self._parts else torch.empty(0)

    def _join(self) -> None:
        import torch

        if self._newest:
            self._parts.append(torch.stack([loss.to(self._newest[-1].device) for loss in self._newest]))
            self._newest.clear()


class Journal:
    """The record of one run. Recording a step never waits for a GPU.

    Args:
        point: the checkpoint to resume from; None for a run from the start.
        accumulation: training steps per optimizer step; 0 when unknown.
    """

    def __init__(self, device: torch.device, point: ResumePoint | None = None, accumulation: int = 0) -> None:
        self.device = device
        self.scheduler: Any = None  # upstream's learning-rate scheduler, once it is made; it knows the optimizer
        self.finished = False  # whether the final adapter was saved
        self.unsaved = False  # whether the newest checkpoint could not be saved, which upstream does not know
        self.ending = False  # whether the run has stopped or failed and is being saved as it is
        self.failed = False  # whether the newest step failed, so that the gradients that it left are unusable
        self.summed_up = False  # whether plugins were asked for their summary
        self.begins: Callable[[], None] | None = None  # called before the first batch that this run computes is read
        self.ends: Callable[[], None] | None = None  # called before the next epoch begins
        # Number and mean loss of a computed epoch whose end nobody has been told yet; see :mod:`.epochs`.
        self.epoch_to_end: tuple[int, float] | None = None
        # The checkpoint that was put into the adapter in place of what the run has trained, and the folder of its
        # weights; None if it was kept in RAM.
        self.holds: ResumePoint | None = None
        self.copy_of: Path | None = None
        self.lines: list[str] = []  # messages for the user since the last look, unless `say` takes them at once
        self.say: Callable[[str], None] = self.lines.append
        self.mean: Callable[[torch.Tensor], torch.Tensor] | None = None  # over the processes; None for a single one
        self.gather: Callable[[Any], list[Any]] | None = None  # the values of all processes; None for a single one
        self._of_all = 0  # losses that are the mean over all processes; those after them are this process's own
        self._validating = False
        # Training steps of the checkpoint; None if it does not say how many there are in its epochs.
        self.steps_before = 0 if point is None else point.steps_done
        self._replay = None if point is None else Replay(point, device)
        self._replayed = self._unknown = 0
        self._losses, self._validation = Losses(), Losses()
        self.epochs_begun = 0  # by upstream's loop, including those of earlier runs
        self._in_epoch = 0
        self._steps_per_epoch: int | None = None
        self._epoch_random: dict[str, Any] | None = None
        self._accumulation = accumulation
        self._optimizer_steps = self._optimizer_steps_before = 0
        self._warned_accumulation = False

    # -- the position ------------------------------------------------------------------------------------------------

    @property
    def catching_up(self) -> bool:
        """Whether upstream's loop still goes through steps that an earlier run has done."""
        return self._replay is not None

    @property
    def walking(self) -> bool:
        """Whether upstream's loop has begun to go through such steps: its reports are no news."""
        return self.catching_up and self.epochs_begun > 0

    @property
    def epochs_done(self) -> int | None:
        """After how many epochs the adapter is what it is now; None within an epoch."""
        if self.holds is not None:
            return None if self.holds.steps else self.holds.epochs
        return self.whole_epochs if self._in_epoch in (0, self._steps_per_epoch) else None

    @property
    def whole_epochs(self) -> int:
        """Epochs that upstream's loop has gone through, including those of earlier runs."""
        return self.epochs_begun - (self._in_epoch != self._steps_per_epoch and self.epochs_begun > 0)

    @property
    def place_in_epoch(self) -> tuple[int, int | None]:
        """Training steps of the epoch that are done, and how many it has; None before the first epoch."""
        return self._in_epoch, self._steps_per_epoch

    @property
    def steps(self) -> int:
        """Training steps done, including those of earlier runs."""
        return len(self._losses)

    @property
    def computed(self) -> int:
        """Training steps that this run has computed itself."""
        return len(self._losses) - (self._replayed if self._replay is None else self._replay.walked)

    @property
    def learned(self) -> bool:
        """Whether this run has made an optimizer step: without one the adapter is what it was at the start."""
        if self.scheduler is None:
            return self.computed > max(1, self._accumulation)
        return self.computed > 0 and int(self.scheduler.last_epoch) > self._optimizer_steps_before

    def loss_by_epoch(self) -> dict[int, float]:
        """Mean loss of every whole epoch with known losses, including those of earlier runs. Waits for the GPU."""
        length = self._steps_per_epoch
        if not length:
            return {}
        losses = self._losses.all().float()
        first = -(-self._unknown // length)
        return {
            number + 1: float(losses[number * length : (number + 1) * length].mean())
            for number in range(first, len(losses) // length)
        }

    def here(self, run: Run) -> ResumePoint | None:
        """The run's position, to be saved; None before its first step, and where too little is known of upstream."""
        if self.scheduler is None or not len(self._losses) or self.epochs_begun == 0:
            return None
        between = self._in_epoch in (0, self._steps_per_epoch)
        now = random_states(self.device)
        if self._in_epoch == 0 and self._epoch_random is not None:
            now = self._epoch_random  # the next epoch has been shuffled, and will be again
        began = None if between else self._epoch_random
        self._share_losses()
        run.saves += 1
        trained = trained_tensors(self.scheduler)
        gradients = [None if weight.grad is None else weight.grad.detach() for weight in trained]
        return ResumePoint(
            epochs=self.whole_epochs,
            steps=0 if between else self._in_epoch,
            steps_per_epoch=self._steps_per_epoch,
            losses=self._losses.all(),
            validation=self._validation.all(),
            random=now,
            epoch_random=began,
            ranks=() if self.gather is None else self.gather({"random": now, "epoch_random": began}),
            gradients=None if self.failed or all(gradient is None for gradient in gradients) else gradients,
            optimizer=self.scheduler.optimizer.state_dict(),
            scheduler=self.scheduler.state_dict(),
            optimizer_class=type(self.scheduler.optimizer).__name__,
            parameters=None if BY_NAME[run.adapter_type].network is None else [weight.detach() for weight in trained],
            save_number=run.saves,
        )

    # -- recording ---------------------------------------------------------------------------------------------------

    def epoch(self, run: Run, songs: Callable[[], Iterator[Any]], length: int) -> Generator[Any, None, None]:
        """One pass of the training loop: upstream's own batches, or placeholders for steps that are replayed.

        Raises:
            Refusal: a resumed run has another number of steps per epoch.
        """
        if self.ends is not None:
            self.ends()
        skipped = 0 if self._replay is None else self._replay.skipped_in_epoch(length)
        if self._replay is not None and skipped == length:
            self._begin(length)
            yield from repeat(_SKIPPED, length)
            return
        if self._replay is not None and skipped > 0:
            self._replay.restart_epoch()
        elif self._replay is not None:
            self.catch_up(run)
        self._begin(length)
        self._epoch_random = random_states(self.device)
        if self.begins is not None:
            begins, self.begins = self.begins, None
            begins()
        batches = songs()
        for _ in range(skipped):
            next(batches)  # the sampler has to go through its order
            yield _SKIPPED
        yield from batches
        self._share_losses()
        if self._in_epoch:
            self.epoch_to_end = self.epochs_begun, self._losses.mean_of_newest(self._in_epoch)

    def validation(self, run: Run, songs: Callable[[], Iterator[Any]], length: int) -> Generator[Any, None, None]:
        """One pass of the validation loop, in the same way."""
        if self._replay is not None:
            if self._replay.skips_validation(length):
                yield from repeat(_SKIPPED, length)
                return
            self.catch_up(run)
        self._validating = True
        try:
            yield from songs()
        finally:
            self._validating = False

    def record(self, loss: torch.Tensor, training: bool) -> torch.Tensor:
        """Record the loss of a step | returns it.

        Several processes each validate on all songs with noise of their own. The mean of their losses is recorded and
        returned, so that upstream decides alike in all of them which adapter is the best.
        """
        if training:
            self._look_at_accumulation()
        elif self.mean is not None and self._validating:
            loss = self.mean(loss)
        (self._losses if training else self._validation).append(loss.detach())
        self._in_epoch += training
        return loss

    def recorded(self, run: Run, training: bool) -> torch.Tensor | None:
        """The loss of a step that an earlier run has done; None for one that has to be computed.

        Raises:
            Refusal: the checkpoint's tensors do not fit the adapter.
        """
        replay = self._replay
        if replay is None:
            return None
        replay.check(run, self.scheduler)
        if not training:
            loss = replay.next_validation_loss()
            self.record(loss, training)
            return loss
        if replay.remaining(self._steps_per_epoch or 1) == 0:
            self.catch_up(run)
            return None
        loss = replay.next_loss()
        self.record(loss, training)
        # A zero gradient for one tensor: without any, some versions stop and loss scaling fails.
        anchor = trained_tensors(self.scheduler)[0]
        return loss.nan_to_num(0.0).to(anchor.device) + 0.0 * anchor.flatten()[0].to(loss.dtype)

    def catch_up(self, run: Run) -> None:
        """Restore the checkpoint's state: from here on the run computes. Raises Refusal when the tensors do not fit."""
        replay, self._replay = self._replay, None  # its tensors are not needed any more
        assert replay is not None
        self._replayed, self._unknown = replay.walked, replay.unknown
        for line in replay.restore(run, self.scheduler):
            self.say(line)
        self._optimizer_steps_before = int(self.scheduler.last_epoch)
        run.steps = run.resumed_at = self._of_all = len(self._losses)

    def _share_losses(self) -> None:
        """Replace this process's own losses by the mean over all processes. Waits for the GPU."""
        if self.mean is not None and (new := len(self._losses) - self._of_all):
            self._losses.replace_newest(self.mean(self._losses.all()[-new:]))
            self._of_all += new

    def _look_at_accumulation(self) -> None:
        """Warn once when an optimizer step came at another place of the epoch than accumulation puts it.

        Some versions of upstream do not reset their count after an epoch whose length gradient accumulation does not
        divide, and go on with shorter sums of gradients. They are left alone: a correction would train differently from
        upstream, for turbo too.
        """
        done = int(self.scheduler.last_epoch) if self.scheduler is not None else 0
        if done == self._optimizer_steps:
            return
        self._optimizer_steps = done
        if self._accumulation and self._in_epoch % self._accumulation and not self._warned_accumulation:
            self._warned_accumulation = True
            self.say(
                "⚠️ ACE-Step carries gradients over from one epoch to the next: "
                f"{self._steps_per_epoch} steps per epoch are not divisible by --gradient-accumulation "
                f"{self._accumulation}. Choose one that divides them."
            )

    def _begin(self, length: int) -> None:
        self.epochs_begun, self._in_epoch, self._steps_per_epoch = self.epochs_begun + 1, 0, length
