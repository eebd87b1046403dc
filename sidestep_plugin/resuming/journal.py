"""Going on with a training as if it had never stopped: what is kept while one runs, and how the next one catches up.

Upstream's loops cannot begin in the middle: for a LoKr and without Lightning there is no such argument, and for a LoRA
the weights are forgotten. So a resumed run goes through upstream's own loop from its first epoch. Until it stands where
the checkpoint was made, no song is read and no model is called: each step answers with the loss that was recorded
then, and upstream's counters, curves and learning rate come out as they were. Then the weights, the optimizer's memory,
waiting gradients and the random states are put in place, and the step that follows is the one that would have followed.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from itertools import repeat
from typing import TYPE_CHECKING, Any, Final

from ..errors import Refusal
from ..run import ResumePoint, Run
from .losses import Losses
from .random_states import random_states, set_random_states
from .weights import check_weights, put_weights

if TYPE_CHECKING:
    import torch


_SKIPPED: Final[dict[str, Any]] = {}
"""Stands for a batch that is not read while a run catches up."""


class Journal:
    """What the host keeps of one run: how far it is, its losses, its random states. No step waits for a GPU.

    Args:
        device: where the run computes.
        point: where to go on; None for a run from the start.
        accumulation: training steps of an optimizer step; 0 when unknown.

    Attributes:
        catching_up: whether upstream's loop still walks over steps that an earlier run has done.
        scheduler: upstream's learning-rate scheduler, once it is made; it knows the optimizer.
        finished: whether the finished adapter was saved.
        unsaved: whether the newest checkpoint could not be saved, which upstream does not know.
        ending: whether the run has stopped or failed, and is saved as it is.
        summed_up: whether plugins were asked for their summary.
        epoch_finished: called with run, number and mean loss after the last step of every epoch that was computed.
    """

    def __init__(self, device: torch.device, point: ResumePoint | None = None, accumulation: int = 0) -> None:
        self.device = device
        self.point = point
        self.catching_up = point is not None
        self.scheduler: Any = None
        self.finished = self.unsaved = self.ending = self.summed_up = False
        self.epoch_finished: Callable[[Run, int, float], None] | None = None
        self.lines: list[str] = []  # what there is to say since the last look
        self._losses, self._validation = Losses(), Losses()
        self._epochs_begun = self._in_epoch = 0
        self._steps_per_epoch: int | None = None
        self._epoch_random: dict[str, Any] | None = None
        self._walked = self._validated = self._unknown = 0
        self._checked = self._told_accumulation = False
        self._accumulation = accumulation
        self._optimizer_steps = 0

    @property
    def walking(self) -> bool:
        """Whether upstream's loop is on its way through steps that are done: what it reports is no news."""
        return self.catching_up and self._epochs_begun > 0

    @property
    def steps(self) -> int:
        """Training steps that are done, those of earlier runs among them."""
        return len(self._losses)

    def loss_by_epoch(self) -> dict[int, float]:
        """Mean loss of every whole epoch whose losses are known, those of earlier runs, too. Waits for the GPU."""
        length = self._steps_per_epoch
        if not length:
            return {}
        losses = self._losses.all().float()
        first = -(-self._unknown // length)
        return {
            number + 1: float(losses[number * length : (number + 1) * length].mean())
            for number in range(first, len(losses) // length)
        }

    @property
    def computed(self) -> int:
        """Training steps that this run has computed itself."""
        return len(self._losses) - self._walked

    # -- while it runs -----------------------------------------------------------------------------------------------

    def record(self, loss: torch.Tensor, training: bool) -> None:
        """Remember the loss of a step that was computed."""
        if training:
            self._look_at_accumulation()
        (self._losses if training else self._validation).append(loss.detach())
        self._in_epoch += training

    def epoch(self, run: Run, songs: Callable[[], Iterator[Any]], length: int) -> Generator[Any, None, None]:
        """One pass of the training loop: upstream's own batches, or placeholders for those that are done.

        Raises:
            Refusal: a resumed run has another number of steps an epoch.
        """
        skipped = 0
        if self.catching_up:
            assert self.point is not None
            self._check_length(length)
            skipped = min(length, self._left(length))
            if skipped == length:
                self._begin(length)
                yield from repeat(_SKIPPED, length)
                return
            if skipped == 0:
                self.catch_up(run)
            elif self.point.epoch_random is not None:
                set_random_states(self.point.epoch_random, self.device)
        self._begin(length)
        self._epoch_random = random_states(self.device)
        batches = songs()
        for _ in range(skipped):
            next(batches)  # the sampler's order has to be gone through
            yield _SKIPPED
        yield from batches
        if self.epoch_finished is not None and self._in_epoch:
            self.epoch_finished(run, self._epochs_begun, self._losses.mean_of_newest(self._in_epoch))

    def validation(self, run: Run, songs: Callable[[], Iterator[Any]], length: int) -> Generator[Any, None, None]:
        """One pass of the validation loop, likewise."""
        if self.catching_up:
            assert self.point is not None
            recorded = self.point.validation
            if recorded is None or self._validated + length <= len(recorded):
                yield from repeat(_SKIPPED, length)
                return
            self.catch_up(run)
        yield from songs()

    def recorded(self, run: Run, training: bool) -> torch.Tensor | None:
        """The loss of a step that an earlier run has done; None for one that has to be computed.

        Raises:
            Refusal: the checkpoint's tensors do not fit the adapter.
        """
        if not self.catching_up:
            return None
        import torch

        assert self.point is not None
        if not self._checked:
            check_weights(run, self.point)
            if self.scheduler is None:
                raise Refusal(
                    "This ACE-Step makes its optimizer otherwise than is known, so nothing can be resumed in it. "
                    "Train anew, or use upstream's main version."
                )
            self._checked = True
        if not training:
            known = self.point.validation
            loss = torch.tensor(float("inf")) if known is None else known[self._validated].clone()
            self._validated += 1
            self.record(loss, training)
            return loss
        if self._left(self._steps_per_epoch or 1) == 0:
            self.catch_up(run)
            return None
        known = self.point.losses
        loss = torch.zeros(()) if known is None else known[self._walked].clone()
        self._walked += 1
        self._unknown += known is None
        self.record(loss, training)
        # A gradient of zero for one tensor: some versions stop, and loss scaling fails, where there is none at all.
        anchor = self._trained()[0]
        return loss.nan_to_num(0.0).to(anchor.device) + 0.0 * anchor.flatten()[0].to(loss.dtype)

    def here(self, run: Run, *, failed: bool = False) -> ResumePoint | None:
        """The place where the run stands; None before its first step, and where upstream is not known well enough.

        Args:
            failed: the newest step failed on its way, so that what it left of gradients is worth nothing.
        """
        if self.scheduler is None or not len(self._losses) or self._epochs_begun == 0:
            return None
        between = self._in_epoch in (0, self._steps_per_epoch)
        begun = self._epochs_begun - (self._in_epoch != self._steps_per_epoch)
        now = random_states(self.device)
        if self._in_epoch == 0 and self._epoch_random is not None:
            now = self._epoch_random  # the next pass has been shuffled, and will be again
        gradients = [None if weight.grad is None else weight.grad.detach() for weight in self._trained()]
        return ResumePoint(
            epochs=begun,
            steps=0 if between else self._in_epoch,
            steps_per_epoch=self._steps_per_epoch,
            losses=self._losses.all(),
            validation=self._validation.all(),
            random=now,
            epoch_random=None if between else self._epoch_random,
            gradients=None if failed or all(gradient is None for gradient in gradients) else gradients,
            optimizer=self.scheduler.optimizer.state_dict(),
            scheduler=self.scheduler.state_dict(),
            optimizer_class=type(self.scheduler.optimizer).__name__,
            parameters=[weight.detach() for weight in self._trained()] if run.adapter_type == "lokr" else None,
        )

    # -- catching up -------------------------------------------------------------------------------------------------

    def catch_up(self, run: Run) -> None:
        """Put everything in place: from here on the run computes. Raises Refusal when the tensors do not fit."""
        import torch

        point, self.catching_up = self.point, False
        assert point is not None
        for values in (point.parameters, point.gradients):
            if values is not None and [weight.shape for weight in self._trained()] != [
                weight.shape if value is None else value.shape
                for weight, value in zip(self._trained(), values, strict=False)
            ]:
                raise Refusal(
                    "The checkpoint does not fit this adapter: other tensors were trained in it than are trained here. "
                    "Resume with the settings that it was made with."
                )
        put_weights(run, point)
        if point.parameters is not None:
            with torch.no_grad():
                for weight, value in zip(self._trained(), point.parameters, strict=True):
                    weight.copy_(value)
        count = len(point.weights)
        run.steps = run.resumed_at = len(self._losses)
        self._put_optimizer(point)
        if point.random is not None:
            set_random_states(point.random, self.device)
        self.lines.append(
            f"✅ Resumed: {count} of {count} tensors of the adapter, {point.where}, "
            f"{len(self._losses)} training steps done"
        )
        self.point = None  # its tensors are not needed any more

    def _put_optimizer(self, point: ResumePoint) -> None:
        optimizer, trained = self.scheduler.optimizer, self._trained()
        for weight in trained:
            weight.grad = None
        if point.gradients is not None:
            for weight, gradient in zip(trained, point.gradients, strict=True):
                weight.grad = None if gradient is None else gradient.to(weight.device, copy=True)
        name = type(optimizer).__name__
        if point.optimizer is None or point.optimizer_class not in ("", name):
            optimizer.state.clear()
            if point.optimizer is not None:
                made_with = f"the checkpoint was made with {point.optimizer_class}, here it is {name}"
                self.lines.append(f"⚠️ The optimizer's memory begins anew: {made_with}")
            return
        groups = optimizer.state_dict()["param_groups"]
        same = point.scheduler is not None and _law(point.scheduler) == _law(self.scheduler.state_dict())
        if same:  # of the old settings the learning rate alone: weight decay and others are this run's
            for group, old in zip(groups, point.optimizer["param_groups"], strict=False):
                group |= {name: old[name] for name in ("lr", "initial_lr") if name in old}
        optimizer.load_state_dict({"state": point.optimizer["state"], "param_groups": groups})
        if same:
            self.scheduler.load_state_dict(point.scheduler)
        elif point.scheduler is not None:
            self.lines.append("⚠️ The learning rate follows the settings of this run, not those of the checkpoint")

    def _check_length(self, length: int) -> None:
        assert self.point is not None
        if self.point.steps_per_epoch not in (None, length):
            raise Refusal(
                f"The checkpoint's training took {self.point.steps_per_epoch} steps an epoch, this one takes {length}. "
                "Resume with the same songs and validation split."
            )

    def _left(self, length: int) -> int:
        """Recorded steps that the loop has not walked over yet."""
        assert self.point is not None
        done = self.point.steps_done
        return (self.point.epochs * length if done is None else done) - self._walked

    def _look_at_accumulation(self) -> None:
        """Say it once when an optimizer step came at another place of the epoch than accumulation puts it.

        Some versions of upstream forget to begin counting anew after an epoch whose length gradient accumulation does
        not divide, and go on with shorter sums of gradients. They are left as they are: mending that would train
        otherwise than upstream does, for turbo too.
        """
        done = int(self.scheduler.last_epoch) if self.scheduler is not None else 0
        if done == self._optimizer_steps:
            return
        self._optimizer_steps = done
        if self._accumulation and self._in_epoch % self._accumulation and not self._told_accumulation:
            self._told_accumulation = True
            self.lines.append(
                f"⚠️ ACE-Step carries gradients over from one epoch to the next: {self._steps_per_epoch} steps an epoch "
                f"are not divisible by --gradient-accumulation {self._accumulation}. Choose one that divides them."
            )

    def _begin(self, length: int) -> None:
        self._epochs_begun, self._in_epoch, self._steps_per_epoch = self._epochs_begun + 1, 0, length

    def _trained(self) -> list[torch.Tensor]:
        return [weight for group in self.scheduler.optimizer.param_groups for weight in group["params"]]


def _law(scheduler: Mapping[str, Any]) -> Any:
    """What of a scheduler's state decides its curve, without how far it is."""
    counters = {"last_epoch", "_step_count", "_last_lr", "T_cur", "T_i", "_get_lr_called_within_step", "_is_initial"}
    kept = {key: value for key, value in scheduler.items() if key not in counters and key != "_schedulers"}
    return kept, [_law(part) for part in scheduler.get("_schedulers", ()) if isinstance(part, Mapping)]
