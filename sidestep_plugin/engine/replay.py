"""How a resumed run gets to where its checkpoint was saved: recorded steps are replayed, then the state is restored.

Upstream's loops cannot start in the middle: there is no such argument for a LoKr or without Lightning, and a LoRA's
weights are not restored. So a resumed run goes through upstream's own loop from its first epoch. Until it reaches the
checkpoint, no song is read and no model is called: each step returns the loss that was recorded, so that counters,
curves and learning rate come out as they were. Then weights, optimizer state, pending gradients and random states are
restored, and the next step is the one that would have followed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import Refusal
from ..run import ResumePoint, Run
from ..text import counted
from .random_states import set_random_states
from .weights import check_weights, put_weights

if TYPE_CHECKING:
    import torch


class Replay:
    """The steps that a checkpoint recorded, and how many of them upstream's loop has gone through."""

    def __init__(self, point: ResumePoint, device: torch.device) -> None:
        self.point = point
        self.device = device
        self.walked = 0  # training steps replayed so far
        self.unknown = 0  # how many of them have no recorded loss
        self._validated = 0
        self._checked = False

    def remaining(self, length: int) -> int:
        """Recorded training steps that the loop has not gone through yet | length: training steps per epoch."""
        done = self.point.steps_done
        return (self.point.epochs * length if done is None else done) - self.walked

    def skipped_in_epoch(self, length: int) -> int:
        """How many steps of the epoch that begins now were recorded.

        Raises:
            Refusal: the checkpoint's epochs have another number of steps.
        """
        if self.point.steps_per_epoch not in (None, length):
            raise Refusal(
                f"The checkpoint's training has {counted(self.point.steps_per_epoch, 'step')} per epoch, this "
                f"one has {length}. "
                "Resume with the same songs and the same validation split."
            )
        return min(length, self.remaining(length))

    def skips_validation(self, length: int) -> bool:
        """Whether the whole validation pass that begins now was recorded."""
        recorded = self.point.validation
        return recorded is None or self._validated + length <= len(recorded)

    def restart_epoch(self) -> None:
        """Restore the random states in which the checkpoint's last epoch began: they decide the order of its songs."""
        if self.point.epoch_random is not None:
            set_random_states(self.point.epoch_random, self.device)

    def check(self, run: Run, scheduler: Any) -> None:
        """Compare the checkpoint with the adapter, once and before the first step. Raises Refusal."""
        if self._checked:
            return
        check_weights(run, self.point.weights)
        if scheduler is None:
            raise Refusal(
                "This version of ACE-Step creates its optimizer in an unknown way, so nothing can be resumed in it. "
                "Start again without --resume-from, or use ACE-Step's main version."
            )
        self._checked = True

    def next_loss(self) -> torch.Tensor:
        """The recorded loss of the next training step, 0 when it was not recorded."""
        import torch

        losses = self.point.losses
        loss = torch.zeros(()) if losses is None else losses[self.walked].clone()
        self.walked += 1
        self.unknown += losses is None
        return loss

    def next_validation_loss(self) -> torch.Tensor:
        """The recorded loss of the next validation step, infinite when it was not recorded."""
        import torch

        losses = self.point.validation
        loss = torch.tensor(float("inf")) if losses is None else losses[self._validated].clone()
        self._validated += 1
        return loss

    # -- restoring ---------------------------------------------------------------------------------------------------

    def restore(self, run: Run, scheduler: Any) -> list[str]:
        """Restore weights, optimizer, learning rate, gradients and random states | returns lines for the user.

        Raises:
            Refusal: the checkpoint's tensors do not fit the adapter.
        """
        point, trained = self.point, trained_tensors(scheduler)
        shapes = [weight.shape for weight in trained]
        for values in (point.parameters, point.gradients):
            if values is None:
                continue
            found = [shape if value is None else value.shape for value, shape in zip(values, shapes, strict=False)]
            if len(values) != len(shapes) or found != shapes:
                raise Refusal(
                    "The checkpoint does not fit this adapter: other tensors were trained in it than are trained here. "
                    "Resume with the settings that it was made with."
                )
        put_weights(run, point.weights)
        put_parameters(trained, point)
        lines = _restore_optimizer(point, scheduler, trained)
        if point.random is not None:
            set_random_states(point.random, self.device)
        count = len(point.weights)
        where = f"{point.where}, {counted(self.walked, 'training step')} done"
        return [*lines, f"✅ Resumed: {count} of {count} tensors of the adapter, {where}"]


def put_parameters(trained: list[torch.Tensor], point: ResumePoint) -> None:
    """Load the trained tensors themselves, where the saved ones are computed from them (LoKr)."""
    import torch

    if point.parameters is not None:
        with torch.no_grad():
            for weight, value in zip(trained, point.parameters, strict=True):
                weight.copy_(value)


def trained_tensors(scheduler: Any) -> list[torch.Tensor]:
    """The tensors that the optimizer of a scheduler trains."""
    return [weight for group in scheduler.optimizer.param_groups for weight in group["params"]]


def _restore_optimizer(point: ResumePoint, scheduler: Any, trained: list[torch.Tensor]) -> list[str]:
    optimizer = scheduler.optimizer
    for weight in trained:
        weight.grad = None
    if point.gradients is not None:
        for weight, gradient in zip(trained, point.gradients, strict=True):
            weight.grad = None if gradient is None else gradient.to(weight.device, copy=True)
    name = type(optimizer).__name__
    if point.optimizer is None or point.optimizer_class not in ("", name):
        optimizer.state.clear()
        if point.optimizer is None:
            return []
        return [
            f"⚠️ The optimizer starts with an empty state: the checkpoint was made with {point.optimizer_class}, this "
            f"training uses {name}"
        ]
    groups = optimizer.state_dict()["param_groups"]
    same = point.scheduler is not None and _curve(point.scheduler) == _curve(scheduler.state_dict())
    if same:  # of the old settings only the learning rate: weight decay and the others are this run's
        for group, old in zip(groups, point.optimizer["param_groups"], strict=False):
            group |= {name: old[name] for name in ("lr", "initial_lr") if name in old}
    optimizer.load_state_dict({"state": point.optimizer["state"], "param_groups": groups})
    if same:
        scheduler.load_state_dict(point.scheduler)
    elif point.scheduler is not None:
        return ["Note: the learning rate follows the settings of this run, not those of the checkpoint"]
    return []


def _curve(scheduler: Mapping[str, Any]) -> Any:
    """The part of a scheduler's state that decides its curve, without its position on it."""
    counters = {"last_epoch", "_step_count", "_last_lr", "T_cur", "T_i", "_get_lr_called_within_step", "_is_initial"}
    kept = {key: value for key, value in scheduler.items() if key not in counters and key != "_schedulers"}
    return kept, [_curve(part) for part in scheduler.get("_schedulers", ()) if isinstance(part, Mapping)]
